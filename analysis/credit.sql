-- Which advantage estimator is how wrong, at which horizon?
--
-- What `evaluate suite=credit` measured last: means over its seeds. bias, action_bias and sd are relative to the root mean
-- square of the true advantages, so that an estimate of 0 has a bias of 1; rmse² = bias² + sd². action_bias is the part
-- of the bias that is not the same for all actions of a state, which a policy gradient feels.
--
-- columns: horizon, method, critic (whose V or Q; null: none), lam (of GAE; td is 0), bias, action_bias, sd, rmse,
--          sign_accuracy (chance is 0.5) and its sign_accuracy_sd over seeds, correlation, steps, seeds
-- param measurement = latest
WITH figures AS (
    SELECT
        name,
        value,
        n,
        (extra->>'horizon')::BIGINT AS horizon,
        extra->>'method' AS method,
        extra->>'critic' AS critic,
        (extra->>'lam')::DOUBLE AS lam,
        (extra->>'seed')::BIGINT AS seed
    FROM diagnostics
    WHERE
        suite = 'credit'
        AND run_id = CASE
            WHEN $measurement <> 'latest' THEN $measurement
            ELSE (SELECT max(run_id) FROM diagnostics WHERE suite = 'credit')
        END
),
means AS (
    SELECT
        horizon, method, critic, lam,
        avg(value) FILTER (name = 'scale') AS scale,
        avg(value) FILTER (name = 'bias_squared') AS bias_squared,
        avg(value) FILTER (name = 'action_bias_squared') AS action_bias_squared,
        avg(value) FILTER (name = 'variance') AS variance,
        avg(value) FILTER (name = 'sign_accuracy') AS sign_accuracy,
        stddev_samp(value) FILTER (name = 'sign_accuracy') AS sign_accuracy_sd,
        avg(value) FILTER (name = 'correlation') AS correlation,
        sum(n) FILTER (name = 'scale') AS steps,
        count(DISTINCT seed) AS seeds
    FROM figures
    GROUP BY ALL
)
SELECT
    horizon, method, critic, lam,
    sqrt(greatest(bias_squared, 0)) / scale AS bias,  -- estimated without bias, so that it may be just below 0
    sqrt(greatest(action_bias_squared, 0)) / scale AS action_bias,
    sqrt(greatest(variance, 0)) / scale AS sd,
    sqrt(bias_squared + variance) / scale AS rmse,
    sign_accuracy, sign_accuracy_sd, correlation, steps::BIGINT AS steps, seeds
FROM means
ORDER BY horizon, rmse, method, critic, lam

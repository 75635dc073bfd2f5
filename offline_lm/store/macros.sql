-- The equations of DESIGN section 3 in SQL, in float64. Everything that runs backwards through an episode is a
-- reverse recursion, never a cumulative product and a division: that would be 0/0 after some thousand steps.

-- discounted_return(rewards, gamma): G_0 of a list of rewards in order of time; null if any reward is null.
CREATE MACRO discounted_return(rewards, gamma) AS
    list_reduce(list_reverse(rewards::DOUBLE[]), lambda later, now: now + gamma::DOUBLE * later, 0::DOUBLE);

-- td_residual: r + gamma * continue * V(s') - V(s). Where continue is 0, next_v is not looked at and may be null.
CREATE MACRO td_residual(reward, continue_, v, next_v, gamma) AS
    reward::DOUBLE
    + CASE WHEN continue_::DOUBLE = 0 THEN 0 ELSE gamma::DOUBLE * continue_::DOUBLE * next_v::DOUBLE END
    - v::DOUBLE;

-- affine_scan(pairs): x_0 = a_0, x_i = a_i + b_i * x_{i-1} for a list of [a, b].
CREATE MACRO affine_scan(pairs) AS
    list_reduce(
        pairs::DOUBLE[][],
        lambda done, pair: list_append(done, pair[1] + pair[2] * done[-1]),
        [0::DOUBLE]
    )[2:];

-- discounted_returns(gamma): (episode_id, step, "return") of every decision. Null where a reward from there on
-- was not logged, and all through a truncated episode whose outcome is not labelled.
CREATE MACRO discounted_returns(gamma) AS TABLE
    WITH scanned AS (
        SELECT
            episode_id,
            list(step ORDER BY step DESC) AS steps,
            affine_scan(list(
                [CASE WHEN NOT truncated OR outcome_known THEN reward END, gamma::DOUBLE * (NOT terminated)::INT]
                ORDER BY step DESC
            )) AS returns
        FROM transitions
        GROUP BY episode_id
    )
    SELECT episode_id, unnest(steps) AS step, unnest(returns) AS "return" FROM scanned;

-- td_residuals(run, gamma): (episode_id, step, td_residual) of every decision that `run` scored, with
-- continue = 1 - terminated. Null where the next state has no value: a truncated end bootstraps from the final
-- observation where that was logged and scored, and from nothing else.
CREATE MACRO td_residuals(run, gamma) AS TABLE
    SELECT
        t.episode_id,
        t.step,
        td_residual(t.reward, NOT t.terminated, now.v, later.v, gamma) AS td_residual
    FROM transitions AS t
    JOIN stored_values AS now
        ON now.run_id = run AND now.episode_id = t.episode_id AND now.step = t.step
    LEFT JOIN stored_values AS later
        ON later.run_id = run AND later.episode_id = t.episode_id AND later.step = t.step + 1;

-- gae_advantages(run, gamma, lambda_): (episode_id, step, advantage),
-- A_t = delta_t + gamma * lambda * continue_t * A_{t+1} (Schulman et al. 2015, eq. 16). A step without a residual
-- is null and takes no part: the sum of the step before it ends there, bootstrapped from its value.
CREATE MACRO gae_advantages(run, gamma, lambda_) AS TABLE
    WITH residuals AS (FROM td_residuals(run, gamma)),
    scanned AS (
        SELECT
            episode_id,
            list(t.step ORDER BY t.step DESC) AS steps,
            list(r.td_residual ORDER BY t.step DESC) AS deltas,
            affine_scan(list(
                [
                    coalesce(r.td_residual, 0),
                    CASE WHEN r.td_residual IS NULL OR t.terminated THEN 0 ELSE gamma::DOUBLE * lambda_::DOUBLE END
                ]
                ORDER BY t.step DESC
            )) AS advantages
        FROM transitions AS t
        JOIN residuals AS r USING (episode_id, step)
        GROUP BY episode_id
    ),
    flat AS (
        SELECT episode_id, unnest(steps) AS step, unnest(deltas) AS delta, unnest(advantages) AS advantage
        FROM scanned
    )
    SELECT episode_id, step, CASE WHEN delta IS NOT NULL THEN advantage END AS advantage FROM flat;

-- Does a loop get better by its own runs, and how far do its values and its policy go from the logs?
--
-- One row a round of `loop`, round 0 being the logs that both arms start from. success is measured on pages that no
-- training saw (measured_on: unseen), with the bootstrap's 95 % interval; of logs that nobody can play again, on them
-- (logs). v_first and return_first: means over the first pages of these episodes; v_error is v_first - return_first, with
-- its interval. kl is that of the judged policy to the logs', in nats a step. exploring: success of the episodes that the
-- round collected. episodes: those that were trained on.
--
-- columns: loop, arm (logs, online, offline), round, run, measured_on, success, low, high, judged (episodes), v_first,
--          return_first, v_error, v_error_low, v_error_high, calibration_error, kl, kl_steps, exploring, episodes,
--          fit_s (the critic's own fit included), collect_s, evaluate_s
-- param loop = all
WITH figures AS (
    SELECT
        run_id AS loop,
        "group" AS arm,
        (extra ->> 'round')::BIGINT AS round,
        extra ->> 'run' AS run,
        split AS measured_on,
        name, value, low, high, n
    FROM diagnostics
    WHERE suite = 'loop' AND name <> 'settings' AND $loop IN ('all', run_id)
)
SELECT
    loop, arm, round, run, measured_on,
    any_value(value) FILTER (name = 'success') AS success,
    any_value(low) FILTER (name = 'success') AS low,
    any_value(high) FILTER (name = 'success') AS high,
    any_value(n) FILTER (name = 'success') AS judged,
    any_value(value) FILTER (name = 'v_first') AS v_first,
    any_value(value) FILTER (name = 'return_first') AS return_first,
    any_value(value) FILTER (name = 'v_error') AS v_error,
    any_value(low) FILTER (name = 'v_error') AS v_error_low,
    any_value(high) FILTER (name = 'v_error') AS v_error_high,
    any_value(value) FILTER (name = 'calibration_error') AS calibration_error,
    any_value(value) FILTER (name = 'kl') AS kl,
    any_value(n) FILTER (name = 'kl') AS kl_steps,
    any_value(value) FILTER (name = 'success_exploring') AS exploring,
    (any_value(value) FILTER (name = 'episodes'))::BIGINT AS episodes,
    sum(value) FILTER (name IN ('seconds_fit', 'seconds_critic')) AS fit_s,
    any_value(value) FILTER (name = 'seconds_collect') AS collect_s,
    any_value(value) FILTER (name = 'seconds_evaluate') AS evaluate_s
FROM figures
GROUP BY loop, arm, round, run, measured_on
ORDER BY loop, round, arm DESC

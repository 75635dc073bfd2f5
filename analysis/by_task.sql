-- How does each task go, and does the critic see it coming from the first step?
--
-- columns: task_id, task_family, split, episodes, success_rate, mean_steps, v_first and return_first (means over
--          first steps), error (v_first - return_first), worst_action (of the lowest advantage), worst_advantage
-- param run = latest
WITH decisions AS (
    SELECT *, step = min(step) OVER (PARTITION BY episode_id) AS is_first
    FROM run_values
    WHERE run_id = $run AND NOT is_final_observation
)
SELECT
    task_id,
    task_family,
    split,
    count(*) FILTER (is_first) AS episodes,
    avg(success::INT) FILTER (is_first) AS success_rate,
    avg(n_steps) FILTER (is_first) AS mean_steps,
    avg(v) FILTER (is_first) AS v_first,
    avg("return") FILTER (is_first) AS return_first,
    v_first - return_first AS error,
    arg_min(action, advantage) AS worst_action,
    min(advantage) AS worst_advantage
FROM decisions
GROUP BY task_id, task_family, split
ORDER BY success_rate, task_id, split

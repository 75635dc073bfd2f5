-- Where do episodes lose value: in which kind of task, by which action, on which site, how far in?
--
-- Each step counts once in every dimension. lost is the sum of its negative advantages; position is the quarter
-- of the episode.
--
-- columns: dimension (task_family, action_name, site, position), value, steps, episodes, lost, lost_per_step,
--          mean_advantage, success_rate (of the episodes)
-- param run = latest
-- param min_steps = 1
WITH decisions AS (
    SELECT
        *,
        '' || (1 + (4 * (step - min(step) OVER (PARTITION BY episode_id))) // n_steps) || '/4' AS position
    FROM run_values
    WHERE run_id = $run AND NOT is_final_observation AND advantage IS NOT NULL
),
long AS (
    SELECT
        episode_id, success, advantage,
        unnest(['task_family', 'action_name', 'site', 'position']) AS dimension,
        unnest([task_family, action_name, site, position]) AS value
    FROM decisions
),
episodes_in AS (
    SELECT dimension, value, count(*) AS episodes, avg(success::INT) AS success_rate
    FROM (SELECT DISTINCT dimension, value, episode_id, success FROM long)
    GROUP BY ALL
)
SELECT
    dimension,
    value,
    count(*) AS steps,
    any_value(e.episodes) AS episodes,
    sum(least(advantage, 0)) AS lost,
    lost / steps AS lost_per_step,
    avg(advantage) AS mean_advantage,
    any_value(e.success_rate) AS success_rate
FROM long
JOIN episodes_in AS e USING (dimension, value)
GROUP BY dimension, value
HAVING steps >= $min_steps
ORDER BY dimension, lost, value

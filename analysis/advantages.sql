-- Which step of one episode is to blame, or to thank, and do the methods agree?
--
-- The advantage of every step by `advantages(method)`, with V and Q of the run. reinforce_trajectory has the episode's
-- return at every step, reinforce the return from there on, mc that less v, td the change of value r + V(next) - V,
-- gae the decayed sum of those, archer q - v, grpo the episode's outcome against the others of its task. Null: unknown.
-- episode is an id, or `failed`: the first failed one by id, or the first where none failed. gamma is the run's own if
-- null.
--
-- columns: task_id, success, step, action, reward, v, q, reinforce_trajectory, reinforce, mc, td, gae, archer, grpo,
--          episode_id
-- param run = latest
-- param episode = failed
-- param gamma = null
-- param lam = 0.95
WITH chosen AS (
    SELECT r.*
    FROM run_values AS r
    WHERE r.run_id = $run AND NOT r.is_final_observation AND $episode IN ('failed', r.episode_id)
    QUALIFY dense_rank() OVER (ORDER BY r.success IS NOT FALSE, r.episode_id) = 1
),
estimated AS (
    FROM advantages('reinforce_trajectory', gamma := $gamma)
    UNION ALL FROM advantages('reinforce', gamma := $gamma)
    UNION ALL FROM advantages('mc', gamma := $gamma)
    UNION ALL FROM advantages('td', gamma := $gamma)
    UNION ALL FROM advantages('gae', lambda_ := $lam, gamma := $gamma)
    UNION ALL FROM advantages('archer')
    UNION ALL FROM advantages('grpo')
),
of_run AS (
    SELECT episode_id, step, method, advantage
    FROM estimated
    WHERE run_id = $run AND $episode IN ('failed', episode_id)
)
SELECT
    c.task_id, c.success, c.step, c.action, c.reward, c.v, c.q,
    max(e.advantage) FILTER (e.method = 'reinforce_trajectory') AS reinforce_trajectory,
    max(e.advantage) FILTER (e.method = 'reinforce') AS reinforce,
    max(e.advantage) FILTER (e.method = 'mc') AS mc,
    max(e.advantage) FILTER (e.method = 'td') AS td,
    max(e.advantage) FILTER (e.method = 'gae') AS gae,
    max(e.advantage) FILTER (e.method = 'archer') AS archer,
    max(e.advantage) FILTER (e.method = 'grpo') AS grpo,
    c.episode_id
FROM chosen AS c
JOIN of_run AS e USING (episode_id, step)
GROUP BY ALL
ORDER BY c.step

-- At which steps did the critic know a better action than the one that was taken?
--
-- The best other candidate against the executed action, largest gap first; only where it is better.
--
-- columns: task_id, step, n_steps, action, q, better_action, better_q, gap, v, candidates, success, split, goal,
--          episode_id
-- param run = latest
-- param k = 20
WITH best AS (
    SELECT
        c.episode_id,
        c.step,
        count(*) AS candidates,
        arg_max(c.action, c.q) FILTER (NOT coalesce(c.executed, c.action = s.action)) AS better_action,
        max(c.q) FILTER (NOT coalesce(c.executed, c.action = s.action)) AS better_q
    FROM candidate_values AS c
    JOIN steps AS s USING (episode_id, step)
    WHERE c.run_id = $run
    GROUP BY ALL
)
SELECT
    r.task_id, r.step, r.n_steps, r.action, r.q, b.better_action, b.better_q, b.better_q - r.q AS gap, r.v,
    b.candidates, r.success, r.split, r.goal, r.episode_id
FROM run_values AS r
JOIN best AS b USING (episode_id, step)
WHERE r.run_id = $run AND gap > 0
ORDER BY gap DESC, r.episode_id, r.step
LIMIT $k

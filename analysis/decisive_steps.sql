-- Which step lost the episode, or won it?
--
-- One row an episode: of a failed one the step with the lowest score, of a successful one the step with the
-- highest; the largest scores first. score is the advantage Q - V, or with by=v the change of value
-- r + V(next) - V (0 after the end; null where the log was cut off and the next state has no value).
--
-- columns: verdict (lost, won), task_id, step, n_steps, action, score, v, v_next, q, advantage, success, split,
--          goal, episode_id
-- param run = latest
-- param k = 20
-- param by = advantage
WITH scored AS (
    SELECT
        r.*,
        CASE WHEN lead(r.step) OVER episode = r.step + 1 THEN lead(r.v) OVER episode END AS v_next,
        td_residual(t.reward, NOT t.terminated, r.v, v_next, 1.0) AS v_change,
        CASE $by WHEN 'advantage' THEN r.advantage WHEN 'v' THEN v_change ELSE error('by is advantage or v') END
            AS score,
        t.episode_id IS NOT NULL AS is_decision
    FROM run_values AS r
    LEFT JOIN transitions AS t USING (episode_id, step)
    WHERE r.run_id = $run
    WINDOW episode AS (PARTITION BY r.episode_id ORDER BY r.step)
)
SELECT
    CASE WHEN success THEN 'won' ELSE 'lost' END AS verdict,
    task_id, step, n_steps, action, score, v, v_next, q, advantage, success, split, goal, episode_id
FROM scored
WHERE is_decision AND score IS NOT NULL AND success IS NOT NULL
QUALIFY row_number() OVER (PARTITION BY episode_id ORDER BY CASE WHEN success THEN -score ELSE score END, step) = 1
ORDER BY abs(score) DESC, episode_id
LIMIT $k

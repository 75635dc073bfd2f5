-- What users see. `stored_NAME` are the files of each table (connect.py); read after it.

CREATE VIEW episodes AS FROM stored_episodes;

-- A step counts only with the episode of its own ingest: steps are committed first, so that an ingest that
-- dies between the two commits leaves nothing to see.
CREATE VIEW steps AS
SELECT s.* EXCLUDE (ingest_id)
FROM stored_steps AS s
SEMI JOIN stored_episodes AS e ON s.episode_id = e.episode_id AND s.ingest_id = e.ingest_id;

-- The newest row of each run.
CREATE VIEW runs AS
FROM stored_runs
QUALIFY row_number() OVER (PARTITION BY run_id ORDER BY written_at DESC, status = 'running') = 1;

CREATE VIEW metrics AS FROM stored_metrics;
CREATE VIEW "values" AS FROM stored_values;
CREATE VIEW candidate_values AS FROM stored_candidate_values;
CREATE VIEW diagnostics AS FROM stored_diagnostics;
CREATE VIEW quarantine AS FROM stored_quarantine;

-- One row a decision, with what the equations of DESIGN section 3 need. A flag that was logged for the episode
-- alone holds for its last decision. `truncated`: cut off, by a flag or because it is known not to have
-- terminated. `outcome_known`: the episode is labelled, so a step limit is part of the task.
CREATE VIEW transitions AS
WITH decisions AS (
    SELECT
        s.episode_id, s.step, s.reward,
        s.step = max(s.step) OVER (PARTITION BY s.episode_id) AS is_last,
        CASE WHEN is_last THEN coalesce(s.terminated, e.terminated) ELSE s.terminated END AS ended,
        CASE WHEN is_last THEN coalesce(s.truncated, e.truncated) ELSE s.truncated END AS cut,
        e.outcome_reward IS NOT NULL OR e.success IS NOT NULL AS outcome_known
    FROM steps AS s
    JOIN episodes AS e USING (episode_id)
    WHERE NOT s.is_final_observation
)
SELECT
    episode_id, step, reward, is_last,
    coalesce(ended, false) AS terminated,
    NOT terminated AND coalesce(cut, NOT ended, false) AND is_last AS truncated,
    outcome_known
FROM decisions;

-- Every scored step of every run with what was seen, done and gained; the final observation of an episode
-- is a row with v alone.
CREATE VIEW run_values AS
SELECT
    v.run_id, v.episode_id, v.step, v.split,
    e.source, e.dataset, e.benchmark, e.task_id, e.task_family, e.site, e.goal, e.seed, e.trial,
    e.policy_id, e.policy_kind, e.success, e.outcome_reward, e.end_reason, e.n_steps,
    s.is_final_observation, s.url, s.title, s.observation, s.response, s.thought,
    s.action, s.action_name, s.action_valid, s.action_error, s.candidates,
    s.reward, s.terminated, s.truncated,
    v.v, v.q, v.q_ensemble, v.advantage, v.td_error, v."return", v.return_mask, v.bootstrap_mask
FROM stored_values AS v
JOIN steps AS s ON v.episode_id = s.episode_id AND v.step = s.step
JOIN episodes AS e ON v.episode_id = e.episode_id;

CREATE VIEW latest_values AS
FROM run_values
WHERE run_id = (SELECT run_id FROM runs WHERE status = 'finished' ORDER BY written_at DESC, run_id LIMIT 1);

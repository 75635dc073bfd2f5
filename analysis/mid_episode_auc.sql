-- Can the critic tell, on the way, how an episode will end?
--
-- AUC for success of v, of q of the logged action and of the step's number alone (fewer steps rank higher), at one
-- step of each episode: floor(at * T) of its T decisions, the last at most. Ties count half. T is known afterwards
-- alone, so the step's number there tells something of the length. Across tasks, knowing which task is hard is enough
-- for an AUC; within_task_auc is the mean over the tasks that have both outcomes (mixed_tasks), null if none has.
-- `evaluate suite=real` adds n-gram baselines and intervals.
--
-- columns: split, source, site, score (v, q, position), episodes, tasks, mixed_tasks, success_rate, auc, within_task_auc
-- param run = latest
-- param at = 0.5
WITH decisions AS (
    SELECT
        split, source, site, episode_id, coalesce(task_id, goal, episode_id) AS task, v, q,
        coalesce(success, outcome_reward >= 1) AS won,
        row_number() OVER (PARTITION BY episode_id ORDER BY step) - 1 AS decision,
        count(*) OVER (PARTITION BY episode_id) AS n
    FROM run_values
    WHERE run_id = $run AND NOT is_final_observation
),
scored AS (
    SELECT
        split, source, site, episode_id, task, won,
        unnest(['v', 'q', 'position']) AS name,
        unnest([v, q, -decision]) AS score
    FROM decisions
    WHERE won IS NOT NULL AND v IS NOT NULL AND decision = least(floor($at * n), n - 1)
),
ranked AS (
    SELECT
        *,
        rank() OVER logs + (count(*) OVER (PARTITION BY split, source, site, name, score) - 1) / 2 AS place,
        rank() OVER one_task + (count(*) OVER (PARTITION BY split, source, site, name, task, score) - 1) / 2
            AS place_in_task
    FROM scored
    WHERE score IS NOT NULL
    WINDOW
        logs AS (PARTITION BY split, source, site, name ORDER BY score),
        one_task AS (PARTITION BY split, source, site, name, task ORDER BY score)
),
by_task AS (
    SELECT
        split, source, site, name, task,
        count(*) AS n,
        count(*) FILTER (won) AS wins,
        sum(place) FILTER (won) AS places,
        -- Mann-Whitney: of all pairs of a success and a failure, those that the score orders rightly
        (sum(place_in_task) FILTER (won) - wins * (wins + 1) / 2) / nullif(wins * (n - wins), 0) AS auc_in_task
    FROM ranked
    GROUP BY ALL
)
SELECT
    split,
    source,
    site,
    name AS score,
    sum(n)::BIGINT AS episodes,
    count(*) AS tasks,
    count(auc_in_task) AS mixed_tasks,
    sum(wins) / episodes AS success_rate,
    (sum(places) - sum(wins) * (sum(wins) + 1) / 2) / nullif(sum(wins) * (episodes - sum(wins)), 0) AS auc,
    avg(auc_in_task) AS within_task_auc
FROM by_task
GROUP BY split, source, site, name
ORDER BY split, source, site, name DESC

-- What is in the store, and what is wrong with it? (No run is needed.)
--
-- unlabelled: neither outcome reward nor success. cut_off: truncated, by a flag or because the episode is known not
-- to have terminated. open_ended: no flag says how it ended. repeated_pages: steps whose observation an earlier step
-- of the episode had. quarantined counts by source alone.
--
-- columns: source, dataset, episodes, steps, success_rate, unlabelled, cut_off, open_ended, final_observations,
--          no_candidates, incomplete_candidates, no_reward, invalid_actions, repeated_pages, quarantined
WITH of_steps AS (
    SELECT
        episode_id,
        count(*) FILTER (NOT is_final_observation) AS steps,
        count(*) FILTER (is_final_observation) AS final_observations,
        count(*) FILTER (NOT is_final_observation AND candidates IS NULL) AS no_candidates,
        count(*) FILTER (NOT is_final_observation AND candidates IS NOT NULL AND candidates_complete IS NOT TRUE)
            AS incomplete_candidates,
        count(*) FILTER (NOT is_final_observation AND reward IS NULL) AS no_reward,
        count(*) FILTER (NOT action_valid OR action_error IS NOT NULL) AS invalid_actions,
        count(observation) - count(DISTINCT hash(observation)) FILTER (observation IS NOT NULL) AS repeated_pages
    FROM steps
    GROUP BY episode_id
),
ends AS (SELECT episode_id, terminated, truncated FROM transitions WHERE is_last),
by_source AS (
    SELECT
        source,
        dataset,
        count(*) AS episodes,
        sum(steps) AS steps,
        avg(success::INT) AS success_rate,
        count(*) FILTER (outcome_reward IS NULL AND success IS NULL) AS unlabelled,
        count(*) FILTER (ends.truncated) AS cut_off,
        count(*) FILTER (NOT ends.terminated AND NOT ends.truncated) AS open_ended,
        sum(final_observations) AS final_observations,
        sum(no_candidates) AS no_candidates,
        sum(incomplete_candidates) AS incomplete_candidates,
        sum(no_reward) AS no_reward,
        sum(invalid_actions) AS invalid_actions,
        sum(repeated_pages) AS repeated_pages
    FROM episodes
    JOIN of_steps USING (episode_id)
    JOIN ends USING (episode_id)
    GROUP BY source, dataset
),
bad AS (SELECT source, count(*) AS quarantined FROM quarantine GROUP BY source)
SELECT source, by_source.* EXCLUDE (source), coalesce(quarantined, 0) AS quarantined
FROM by_source
FULL JOIN bad USING (source)
ORDER BY source, dataset

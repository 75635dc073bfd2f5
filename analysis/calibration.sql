-- When the critic says 0.7, how often does it end well?
--
-- Steps in bins of equal width of v, split by split, against the return from there on and the success of the
-- episode. The bins cover 0 to 1 and whatever lies beyond.
--
-- columns: split, low, high, steps, episodes, mean_v, mean_return, gap (mean_v - mean_return), success_rate, brier
-- param run = latest
-- param bins = 10
WITH scored AS (
    SELECT split, episode_id, v, "return", success::INT AS success
    FROM run_values
    WHERE run_id = $run AND NOT is_final_observation AND v IS NOT NULL
),
span AS (SELECT least(0, min(v)) AS low, greatest(1, max(v)) AS high FROM scored),
binned AS (
    SELECT
        scored.*,
        span.low AS first,
        (span.high - span.low) / $bins AS width,
        least($bins - 1, floor((v - span.low) / width))::INT AS bin
    FROM scored, span
)
SELECT
    split,
    any_value(first + bin * width) AS low,
    any_value(first + (bin + 1) * width) AS high,
    count(*) AS steps,
    count(DISTINCT episode_id) AS episodes,
    avg(v) AS mean_v,
    avg("return") AS mean_return,
    avg(v - "return") AS gap,
    avg(success) AS success_rate,
    avg((v - success) ** 2) AS brier
FROM binned
GROUP BY split, bin
ORDER BY split, bin

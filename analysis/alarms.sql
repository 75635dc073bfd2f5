-- What is wrong with a critic, and with the logs that it learnt from?
--
-- The alarms that `fit` raised of a run, in words. None: nothing was found, which is no proof of anything. The other
-- numbers of the run are in the table `diagnostics` too: suites `fit`, `intervals`, and `parts` (by turn,
-- site and steps to the end).
--
-- columns: critic, split (the episodes measured on), alarm, value (measured), threshold (that it passed), sentence
-- param run = latest
SELECT
    "group" AS critic,
    split,
    name AS alarm,
    value,
    (extra ->> 'threshold')::DOUBLE AS threshold,
    extra ->> 'sentence' AS sentence
FROM diagnostics
WHERE run_id = $run AND suite = 'alarms'
ORDER BY critic, split, alarm, sentence

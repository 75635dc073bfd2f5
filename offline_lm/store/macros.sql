-- The equations of DESIGN section 3 in SQL, in float64. Everything that runs backwards through an episode is a
-- reverse recursion, never a cumulative product and a division: that would be 0/0 after some thousand steps.

-- discounted_return(rewards, gamma): G_0 of a list of rewards in order of time; null if any reward is null.
CREATE MACRO discounted_return(rewards, gamma) AS
    list_reduce(list_reverse(rewards::DOUBLE[]), lambda later, now: now + gamma::DOUBLE * later, 0::DOUBLE);

-- td_residual: r + gamma * continue * V(s') - V(s). Where continue is 0, next_v is not looked at and may be null.
CREATE MACRO td_residual(reward, continue_, v, next_v, gamma) AS
    reward::DOUBLE
    + CASE WHEN continue_::DOUBLE = 0 THEN 0 ELSE gamma::DOUBLE * continue_::DOUBLE * next_v::DOUBLE END
    - v::DOUBLE;

-- affine_scan(pairs): x_0 = a_0, x_i = a_i + b_i * x_{i-1} for a list of [a, b].
CREATE MACRO affine_scan(pairs) AS
    list_reduce(
        pairs::DOUBLE[][],
        lambda done, pair: list_append(done, pair[1] + pair[2] * done[-1]),
        [0::DOUBLE]
    )[2:];

-- discounted_returns(gamma): (episode_id, step, "return") of every decision. Null where a reward from there on
-- was not logged, and all through a truncated episode whose outcome is not labelled.
CREATE MACRO discounted_returns(gamma) AS TABLE
    WITH scanned AS (
        SELECT
            episode_id,
            list(step ORDER BY step DESC) AS steps,
            affine_scan(list(
                [CASE WHEN NOT truncated OR outcome_known THEN reward END, gamma::DOUBLE * (NOT terminated)::INT]
                ORDER BY step DESC
            )) AS returns
        FROM transitions
        GROUP BY episode_id
    )
    SELECT episode_id, unnest(steps) AS step, unnest(returns) AS "return" FROM scanned;

-- td_residuals(run, gamma): (episode_id, step, td_residual) of every decision that `run` scored, with
-- continue = 1 - terminated. Null where the next state has no value: a truncated end bootstraps from the final
-- observation where that was logged and scored, and from nothing else.
CREATE MACRO td_residuals(run, gamma) AS TABLE
    SELECT
        t.episode_id,
        t.step,
        td_residual(t.reward, NOT t.terminated, now.v, later.v, gamma) AS td_residual
    FROM transitions AS t
    JOIN stored_values AS now
        ON now.run_id = run AND now.episode_id = t.episode_id AND now.step = t.step
    LEFT JOIN stored_values AS later
        ON later.run_id = run AND later.episode_id = t.episode_id AND later.step = t.step + 1;

-- advantages(method, lambda_ := 0.95, gamma := NULL): (run_id, episode_id, step, method, advantage, target, baseline)
-- of every decision in the episodes that a run scored, with the run's V and Q. advantage is target - baseline. The
-- names mean what they mean in ope/credit.py and algos/:
--   reinforce             G_t, the reward to go (Williams 1992)
--   reinforce_trajectory  G_0 at every step
--   mc, or reinforce_v    G_t - V
--   td, or td0            r + gamma * continue * V(s') - V(s)
--   gae                   A_t = td_t + gamma * lambda_ * continue_t * A_{t+1} (Schulman et al. 2015, eq. 16)
--   archer                Q - V, Q the least of the ensemble (Zhou et al. 2024)
--   grpo, dr_grpo         R - mean, for grpo over the sample standard deviation; R is the sum of an episode's rewards,
--                         its group the task's episodes that the run scored and whose R is known (losses/groups.py)
-- The discount is the run's algo.gamma unless `gamma` is given; the run's data.truncated says whether a labelled step
-- limit counts in G and R. What needs no critic is also there with a null run_id: for every episode of the store,
-- undiscounted unless `gamma` is given. What cannot be known is null. A step without a td is null in gae and takes no
-- part: the sum of the step before it ends there, bootstrapped from its value.
CREATE MACRO advantages(method, lambda_ := 0.95, gamma := NULL) AS TABLE
    WITH scored AS (
        SELECT
            s.run_id, s.episode_id,
            coalesce(gamma::DOUBLE, (r.config ->> '$.algo.gamma')::DOUBLE) AS discount,
            coalesce(r.config ->> '$.data.truncated', 'outcome') = 'outcome' AS limit_counts
        FROM (SELECT DISTINCT run_id, episode_id FROM stored_values) AS s
        LEFT JOIN runs AS r USING (run_id)
        UNION ALL
        SELECT NULL, episode_id, coalesce(gamma::DOUBLE, 1), true
        FROM episodes
        WHERE method IN ('reinforce', 'reinforce_trajectory', 'grpo', 'dr_grpo')
    ),
    decisions AS (
        SELECT
            s.run_id, s.episode_id, t.step, now.v, now.q,
            CASE WHEN NOT t.truncated OR (t.outcome_known AND s.limit_counts) THEN t.reward END AS counted,
            td_residual(t.reward, NOT t.terminated, now.v, later.v, s.discount) AS delta,
            s.discount * (NOT t.terminated)::INT AS onward
        FROM scored AS s
        JOIN transitions AS t USING (episode_id)
        LEFT JOIN stored_values AS now
            ON now.run_id = s.run_id AND now.episode_id = s.episode_id AND now.step = t.step
        LEFT JOIN stored_values AS later
            ON later.run_id = s.run_id AND later.episode_id = s.episode_id AND later.step = t.step + 1
    ),
    scanned AS (
        SELECT
            run_id, episode_id,
            list({'step': step, 'v': v, 'q': q, 'delta': delta} ORDER BY step DESC) AS rows,
            affine_scan(list(
                CASE
                    WHEN method NOT IN ('td', 'td0', 'gae') THEN [counted, onward]
                    WHEN method = 'gae' AND delta IS NOT NULL THEN [delta, lambda_::DOUBLE * onward]
                    ELSE [coalesce(delta, 0), 0]
                END
                ORDER BY step DESC
            )) AS sums
        FROM decisions
        GROUP BY run_id, episode_id
    ),
    outcomes AS (
        SELECT
            d.run_id, d.episode_id, coalesce(e.task_id, e.goal, e.episode_id) AS task,
            CASE WHEN count(d.counted) = count(*) THEN sum(d.counted) END AS outcome
        FROM decisions AS d
        JOIN episodes AS e USING (episode_id)
        WHERE method IN ('grpo', 'dr_grpo')
        GROUP BY ALL
    ),
    compared AS (
        SELECT
            run_id, episode_id, outcome,
            avg(outcome) OVER one_task AS mean,
            CASE method WHEN 'grpo' THEN stddev_samp(outcome) OVER one_task ELSE 1 END AS scale,
            min(outcome) OVER one_task AS low,
            max(outcome) OVER one_task AS high,
            high - low <= 64 * 2.22e-16 * greatest(abs(high), abs(low)) AS flat  -- equal but for rounding
        FROM outcomes
        WINDOW one_task AS (PARTITION BY run_id, task)
    ),
    unrolled AS (
        SELECT run_id, episode_id, unnest(rows, max_depth := 2), unnest(sums) AS x, sums[-1] AS first_x FROM scanned
    ),
    parts AS (
        SELECT
            r.run_id, r.episode_id, r.step, c.scale, c.flat,
            CASE
                WHEN method IN ('reinforce', 'mc', 'reinforce_v') THEN r.x
                WHEN method = 'reinforce_trajectory' THEN r.first_x
                WHEN method IN ('td', 'td0', 'gae') THEN CASE WHEN r.delta IS NOT NULL THEN r.v + r.x END
                WHEN method = 'archer' THEN r.q
                WHEN method IN ('grpo', 'dr_grpo') THEN c.outcome
                ELSE error(
                    'advantages: no method ' || method
                    || ': there are reinforce, reinforce_trajectory, mc, td, gae, archer, grpo, dr_grpo'
                )
            END AS target,
            CASE
                WHEN method IN ('reinforce', 'reinforce_trajectory') THEN 0
                WHEN method IN ('grpo', 'dr_grpo') THEN c.mean
                ELSE r.v
            END AS baseline
        FROM unrolled AS r
        LEFT JOIN compared AS c ON c.run_id IS NOT DISTINCT FROM r.run_id AND c.episode_id = r.episode_id
    )
    SELECT
        run_id, episode_id, step, method AS method,
        CASE
            WHEN method NOT IN ('grpo', 'dr_grpo') THEN target - baseline
            WHEN flat AND target IS NOT NULL THEN 0
            ELSE (target - baseline) / scale
        END AS advantage,
        target, baseline
    FROM parts;

-- gae_advantages(run, gamma, lambda_): (episode_id, step, advantage) by gae of every decision with a value.
CREATE MACRO gae_advantages(run, gamma, lambda_) AS TABLE
    SELECT episode_id, step, advantage
    FROM advantages('gae', lambda_ := lambda_, gamma := gamma)
    WHERE run_id = run AND baseline IS NOT NULL;

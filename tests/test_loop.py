"""The loop on the text shop, whole and small: rounds, what they train on, figures, and kills at every phase."""

import json
import math
import multiprocessing
import os
import shutil
import signal

import numpy as np
import orjson
import pytest
from omegaconf import OmegaConf

import offline_lm
from offline_lm import _loop_judge as judge
from offline_lm import _loop_rounds as rounds
from offline_lm import cli, ingest, loop, query
from offline_lm._loop_judge import Figure
from offline_lm.envs.policies import Chooser, greedy
from offline_lm.envs.shop import Site, Task, record
from offline_lm.errors import UserError
from offline_lm.models.critic import Critic, Score
from offline_lm.store import Store
from offline_lm.store.ingest import add
from offline_lm.types import Candidate, Episode, Step

SMALL = [
    *("model@fit.model=tiny", "fit.model.stage.tokens=2000", "fit.model.vocab_size=400", "fit.model.width=32"),
    *("fit.model.layers=1", "fit.model.attention_heads=2", "fit.optim.batch_size=64", "fit.optim.warmup=2"),
    *("fit.optim.steps=8", "fit.threads=1", "fit.logger.tensorboard=false", "fit.baselines=false"),
    *("fit.data.held_out=0", "fit.data.history=0", "algo@fit.algo=awr", "fit.actor.steps=2", "fit.actor.warmup=1"),
    *("where='true'", "name=small", "collect.env=shop", "collect.tasks=[shop3/0,shop3/1]", "collect.episodes=4"),
    *("collect.max_steps=6", "collect.pages=1", "evaluation.episodes=3", "evaluation.tasks=[shop3/8,shop3/9,shop3/10]"),
    *("collect.redact.patterns={}", "kl_steps=12", "resamples=100"),
]


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """A store that holds logs alone: 12 episodes."""
    folder = tmp_path_factory.mktemp("loop")
    episodes = record([Task(Site.draw(3), i) for i in range(3)], 4)
    (folder / "shop.jsonl").write_bytes(b"\n".join(orjson.dumps(e) for e in episodes))
    assert ingest.main([f"path={folder / 'shop.jsonl'}", f"store={folder / 'store'}"]) == 0
    return folder / "store"


@pytest.fixture(scope="module")
def store(logs):
    """Two rounds of both arms."""
    own = logs.with_name("looped")
    shutil.copytree(logs, own)
    assert loop.main([*SMALL, f"store={own}", "rounds=2"]) == 0
    assert loop.main([*SMALL, f"store={own}", "rounds=2", "online=false", f"plot={own.with_name('loop.svg')}"]) == 0
    return own


def ask(store, sql, *params):
    return offline_lm.connect(store).execute(sql, list(params)).fetchall()


def configs(store):
    """By run: its algorithm, and its configuration."""
    rows = ask(store, "SELECT run_id, algo, config FROM runs WHERE status = 'finished'")
    return {run: (algo, json.loads(config)) for run, algo, config in rows}


def test_what_each_round_trains_on(store):
    done, fits = rounds.read(Store.open(store), "small-s0"), configs(store)
    assert set(done) == {("logs", 0), ("online", 1), ("online", 2), ("offline", 1), ("offline", 2)}
    # the first round is the same for both, and done once: 1 + 1 + 1 fits, of a critic and an actor each
    assert done["online", 1].run == done["offline", 1].run
    assert sorted(algo for algo, _ in fits.values()) == ["awr"] * 3 + ["iql_lm"] * 3
    assert {key: each.figures["episodes"].value for key, each in done.items()} == {
        **{("logs", 0): 12, ("online", 1): 12, ("offline", 1): 12, ("online", 2): 16, ("offline", 2): 12}
    }
    for each in (done["online", 2], done["offline", 2]):
        _, config = fits[each.run]
        assert config["actor"]["critic"] == each.critic
        # as many updates, from other first weights, on the backbone of the first round
        assert (config["optim"]["steps"], config["heads_seed"], config["model"]["stage"]["tokens"]) == (8, 2, 0)
        assert config["model"]["path"] == str(store / "runs" / done["online", 1].critic / "backbone")
        mix = config["data"]["sampling"]["mix"]
        assert (mix is None) == (each.arm == "offline")
        if mix is not None:
            assert (mix["logged"]["share"], mix["fresh"]["share"]) == (0.5, 0.5)
            fresh = ask(store, f"SELECT DISTINCT dataset FROM episodes WHERE {mix['fresh']['where']}")
            assert fresh == [("loop/small-s0/1",)]
    # no run has seen a page that rounds are judged on
    unseen = "SELECT count(*), count(DISTINCT dataset) FROM episodes WHERE contains(dataset, '/unseen/')"
    assert ask(store, unseen) == [(9, 3)]
    seen = "SELECT count(*) FROM run_values WHERE contains(coalesce(dataset, ''), '/unseen/') OR seed >= 100000000"
    assert ask(store, seen) == [(0,)]
    assert ask(store, "SELECT count(*) FROM run_values WHERE dataset = 'loop/small-s0/1'")[0][0] > 0


def test_pages_are_those_that_were_asked_for(store):
    played = "SELECT dataset, task_id, seed FROM episodes WHERE starts_with(dataset, 'loop/') ORDER BY 1, 2, 3"
    by_part: dict[str, list[tuple[str, int]]] = {}
    for dataset, task, seed in ask(store, played):
        by_part.setdefault(dataset, []).append((task, seed))
    for number in (1, 2):
        first = number * loop.SEEDS
        pages = [(f"shop3/{task}", seed) for task in (0, 1) for seed in (first, first + 1)]
        assert sorted(by_part.pop(f"loop/small-s0/{number}")) == pages
    assert len(by_part) == 3
    for pages in by_part.values():  # every policy is judged on the same
        assert pages == [("shop3/10", loop.UNSEEN), ("shop3/8", loop.UNSEEN), ("shop3/9", loop.UNSEEN)]


def test_figures_are_those_of_the_episodes(store):
    done = rounds.read(Store.open(store), "small-s0")
    won = ask(store, "SELECT avg(success::INT) FROM episodes WHERE NOT starts_with(dataset, 'loop/')")
    assert done["logs", 0].figures["success"].value == pytest.approx(won[0][0])
    for (arm, _), each in done.items():
        if arm == "logs":
            continue
        dataset = f"loop/small-s0/unseen/{each.run}"
        rows = ask(
            store,
            "SELECT goal, observation, success, outcome_reward, n_steps FROM episodes JOIN steps USING (episode_id)"
            " WHERE dataset = ? AND step = 0",
            dataset,
        )
        critic = Critic.from_pretrained(store / "runs" / each.critic)
        v = [s.v for s in critic.score([{"goal": goal, "observation": page} for goal, page, *_ in rows])]
        returns = [0.95 ** (n - 1) * reward for *_, reward, n in rows]
        figures = each.figures
        assert figures["success"][0] == pytest.approx(np.mean([row[2] for row in rows]))
        assert figures["success"].n == 3
        assert figures["v_first"].value == pytest.approx(np.mean(v), abs=1e-5)
        assert figures["return_first"].value == pytest.approx(np.mean(returns))
        assert figures["v_error"].value == pytest.approx(np.mean(v) - np.mean(returns), abs=1e-5)
        seconds = ask(store, "SELECT run_id, seconds FROM runs")
        assert figures["seconds_fit"].value == dict(seconds)[each.run]
        assert figures["seconds_critic"].value == dict(seconds)[each.critic]
        assert figures["kl"].n == 12
        assert ("success_exploring" in figures) == (arm == "online")


def test_the_question_and_the_picture(store):
    sql = query.read_sql("loop.sql")
    with Store.open(store).connect() as db:
        result = db.execute(sql, {"loop": "small-s0"})
        rows = [dict(zip([c[0] for c in result.description], row, strict=True)) for row in result.fetchall()]
        assert db.execute(sql, {"loop": "other"}).fetchall() == []
    assert [(row["round"], row["arm"]) for row in rows] == [
        *((0, "logs"), (1, "online"), (1, "offline"), (2, "online"), (2, "offline"))
    ]
    done = rounds.read(Store.open(store), "small-s0")
    for row in rows[1:]:
        figures = done[row["arm"], row["round"]].figures
        assert (row["success"], row["low"], row["high"], row["judged"]) == figures["success"]
        assert (row["kl"], row["v_error"], row["v_error_high"]) == (
            *(figures["kl"].value, figures["v_error"].value, figures["v_error"].high),
        )
        assert row["fit_s"] == figures["seconds_fit"].value + figures["seconds_critic"].value
        assert (row["collect_s"] is None) == (row["arm"] == "offline")
    svg = store.with_name("loop.svg").read_text()
    assert svg.count("<polyline") == 8  # success, V, return and KL of each arm
    assert "nan" not in svg


def test_the_same_command_again_does_nothing(store, capsys):
    counts = (
        "SELECT (SELECT count(*) FROM stored_runs), (SELECT count(*) FROM episodes), (SELECT count(*) FROM diagnostics)"
    )
    before = ask(store, counts)
    capsys.readouterr()
    assert loop.main([*SMALL, f"store={store}", "rounds=2", "json=true", "fit.threads=2"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert ask(store, counts) == before
    assert [(each["round"], each["arm"]) for each in told["rounds"]] == [(0, "logs"), (1, "online"), (2, "online")]
    assert loop.main([*SMALL, f"store={store}", "rounds=2", "fit.optim.steps=9"]) == 2
    assert "fit.optim.steps=9: the loop small-s0 of" in capsys.readouterr().err


# -- kills -------------------------------------------------------------------------------------------------------

POINTS = {
    "the logs": "diagnostics.committed:1",
    "critic": "runs.committed:1",
    "critic's values": "values.committed:1",
    "actor": "runs.committed:3",  # the critic's two rows, then the actor's first
    "judging": "episodes.committed:1",
    "collecting": "episodes.committed:4",  # two more on unseen pages, then the first two of the round
    "the round's rows": "diagnostics.written:1",
}


def begin(point: str | None, argv: list[str]) -> None:
    if point is not None:
        os.environ["OFFLINE_LM_FAILPOINT"] = point
    raise SystemExit(loop.main(argv))


def test_killed_anywhere_it_goes_on(logs, store):
    """A kill at each phase, and at the end the figures of a loop that was never killed."""
    own = logs.with_name("killed")
    shutil.copytree(logs, own)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["offline_lm.loop"])
    known = []
    for point in (*POINTS.values(), None):
        process = context.Process(target=begin, args=(point, [*SMALL, f"store={own}", "rounds=1"]))
        process.start()
        process.join()
        assert process.exitcode == (0 if point is None else -signal.SIGKILL), point
        known.append(len(ask(own, "SELECT 1 FROM episodes")))
    assert known == [12, 12, 12, 12, 13, 12 + 3 + 2, 12 + 3 + 4, 12 + 3 + 4]
    ended, whole = (rounds.read(Store.open(each), "small-s0")["online", 1] for each in (own, store))
    assert ended.figures.keys() == whole.figures.keys()
    for name, figure in whole.figures.items():
        if not name.startswith("seconds_"):
            # intervals resample the episodes in the order of their ids, which hold the run's
            np.testing.assert_allclose(ended.figures[name].value, figure.value, rtol=1e-3, atol=1e-4, err_msg=name)
            assert ended.figures[name].n == figure.n
    # what was done was not done again: one critic and one actor are finished, and as many as were killed are not
    statuses = ask(own, "SELECT algo, status, count(*) FROM runs GROUP BY ALL ORDER BY ALL")
    assert statuses == [
        ("awr", "finished", 1),
        ("awr", "running", 1),
        ("iql_lm", "finished", 1),
        ("iql_lm", "running", 2),
    ]
    assert ask(own, "SELECT count(*) FROM diagnostics WHERE suite = 'loop' AND name = 'settings'") == [(1,)]


# -- figures by hand ---------------------------------------------------------------------------------------------


def test_seconds_in_which_something_was_under_way():
    assert judge.busy([(10, 2), (11, 3), (20, 1), (11, 1)]) == 5
    assert judge.busy([]) == 0


def test_a_mean_and_its_interval():
    assert judge.mean(np.array([]), 10).n == 0
    assert math.isnan(judge.mean(np.array([]), 10).value)
    value, low, high, n = judge.mean(np.repeat([0.0, 1.0], 50), 2000)
    assert (value, n) == (0.5, 100)
    # the normal approximation: 0.5 ± 1.96 * 0.05
    assert (low, high) == pytest.approx((0.402, 0.598), abs=0.015)


def logged(native_id, success, logprobs, *, actions=("a", "b"), every=True):
    """An episode of two steps; it takes the first action, then the second."""
    steps = [
        Step(
            step=t,
            observation=f"page {t}",
            action=actions[t],
            reward=float(success) if t == 1 else 0.0,
            terminated=t == 1,
            behavior_logprob=math.log(logprobs[t]),
            candidates=tuple(
                Candidate(action=a, logprob=math.log(p) if every and p else None)
                for a, p in zip(actions, logprobs, strict=True)
            ),
            candidates_complete=True,
        )
        for t in (0, 1)
    ]
    return Episode(source="jsonl", native_id=native_id, task_id=native_id, steps=tuple(steps), success=success)


def policy(*p):
    return Chooser("fixed", lambda states: [(np.array(p), None) for _ in states])


@pytest.mark.parametrize("every", [True, False])
def test_the_distance_to_the_logs(tmp_path, every):
    """From all candidates' probabilities, and from those of the logged actions alone."""
    store = Store.create(tmp_path / "store")
    add(store, [logged("x", True, (0.25, 0.75), every=every)])
    with store.connect() as db:
        value, *_, n = judge.kl_to_logs(policy(0.5, 0.5), db, "true", 10)
        certain = judge.kl_to_logs(policy(0.0, 1.0), db, "true", 10).value
        assert judge.kl_to_logs(policy(0.5, 0.5), db, "success = false", 10).n == 0
        assert judge.kl_to_logs(policy(0.5, 0.5), db, "true", 1).n == 1
    assert n == 2
    half = 0.5 * math.log(0.5 / 0.25), 0.5 * math.log(0.5 / 0.75)
    # both steps alike; or a in the one and b in the other, each over its chance of being logged
    assert value == pytest.approx(sum(half) if every else (half[0] / 0.25 + half[1] / 0.75) / 2)
    assert certain == pytest.approx(-math.log(0.75) if every else (0 - math.log(0.75) / 0.75) / 2)


def test_logged_actions_alone_give_the_same_mean():
    """Over all that the logs' policy may do, w log w is KL(policy || logs')."""
    p, behaviour = np.array([0.7, 0.2, 0.1, 0.0]), np.array([0.1, 0.4, 0.2, 0.3])
    choice = Chooser("p", lambda states: [(p, None) for _ in states]).act([state(4)])[0]
    names = [c.action for c in choice.candidates]
    single = [
        judge._divergence(choice, a, math.log(b), dict.fromkeys(names)) for a, b in zip(names, behaviour, strict=True)
    ]
    kl = (p[:3] * np.log(p[:3] / behaviour[:3])).sum()
    assert behaviour @ np.array(single) == pytest.approx(kl)
    exact = judge._divergence(
        choice, names[0], math.log(0.1), dict(zip(names, np.log(behaviour).tolist(), strict=True))
    )
    assert exact == pytest.approx(kl)


def test_what_the_logs_cannot_do_is_not_counted():
    choice = Chooser("p", lambda states: [(greedy([0.0, 1.0], 0), None) for _ in states]).act([state(2)])[0]
    assert judge._divergence(choice, "0", 0.0, {"0": 0.0, "1": None}) is None
    assert judge._divergence(choice, "0", 0.0, {"0": None, "1": None}) == 0.0


def state(n):
    from offline_lm.envs.policies import State

    return State("goal", "page", tuple(map(str, range(n))), np.random.default_rng(0))


def test_values_are_held_against_what_came(tmp_path):
    class Fixed:
        def score(self, states):
            return [Score(0.75 if each["observation"] == "page 0" else 9.0, None) for each in states]

    store = Store.create(tmp_path / "store")
    add(store, [logged(f"{i}", i % 4 < 3, (0.5, 0.5)) for i in range(48)])
    with store.connect() as db:
        found = judge.calibration(Fixed(), db, "true", 0.5, 50)  # type: ignore[arg-type]
        few = judge.calibration(Fixed(), db, "task_id IN ('0', '1')", 0.5, 50)  # type: ignore[arg-type]
        won = judge.success(db, "true", 50)
    assert found["v_first"].value == 0.75
    assert found["return_first"].value == pytest.approx(3 / 4 * 0.5)
    assert found["v_error"].value == pytest.approx(0.375)
    # equal predictions share a bin: its gap is 0.375, less what chance adds to it, sqrt(2 / pi) standard errors
    error = 0.5 * math.sqrt(0.75 * 0.25 / 47)
    assert found["calibration_error"].value == pytest.approx(0.375 - math.sqrt(2 / math.pi) * error)
    assert math.isnan(few["calibration_error"].value)
    assert (won.value, won.n) == (0.75, 48)


# -- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("name", "a/b", "name=a/b: letters"),
        ("rounds", 0, "rounds=0: a whole number from 1 is wanted"),
        ("collect.episodes", 10_001, "collect.episodes=10001: a whole number from 1 to 10000"),
        ("online", "no", "online=no: true or false"),
        ("fresh", 1, "fresh=1: null or a share"),
        ("fit.data.sampling.mix", {"logged": 1.0}, "fit.data.sampling.mix: give fresh=null with it"),
        ("fit.data.where", "false", "fit.data.where=false: the loop sets it; give where="),
        ("explore", {"seed": 1}, "explore.seed: no such key of collect, or one that the loop sets"),
        ("behaviours", [{"policy": "random"}], "episodes too"),
    ],
)
def test_mistakes_are_told(small, key, value, message):
    cfg = small.copy()
    OmegaConf.update(cfg, key, value, merge=False)
    with pytest.raises(UserError) as told:
        loop._check(cfg)
    assert message in str(told.value)


@pytest.fixture(scope="module")
def small():
    cfg = cli.composed("loop", *SMALL)
    loop._check(cfg)
    return cfg


@pytest.mark.parametrize(("where", "message"), [("nope = 1", "where="), ("false", "no episode of")])
def test_logs_that_are_not_there(small, logs, where, message):
    cfg = small.copy()
    cfg.where = where
    with pytest.raises(UserError) as told:
        loop._Loop(cfg, Store.open(logs), "small-s0", "online", []).begin()
    assert message in str(told.value)


def test_behaviours_play_the_logs(tmp_path, capsys):
    """Round 0 of a store that holds nothing; the second loop in it finds that its episodes are there already."""
    argv = [*SMALL, f"store={tmp_path / 'a'}", "where=null", "behaviours=[{policy:random,episodes:3}]", "rounds=1"]
    assert loop.main([*argv, "algo@fit.algo=q_mc", "kl_steps=0"]) == 0
    done = rounds.read(Store.open(tmp_path / "a"), "small-s0")
    assert (done["logs", 0].split, done["logs", 0].figures["episodes"].value) == ("unseen", 3)
    assert done["online", 1].run == done["online", 1].critic
    assert "kl" not in done["online", 1].figures
    capsys.readouterr()
    assert loop.main([*argv, "algo@fit.algo=q_mc", "kl_steps=0", "name=other"]) == 2
    assert "3 of the episodes of loop/other-s0/0 stand in" in capsys.readouterr().err


def test_a_round_without_figures_is_drawn():
    made = [rounds.Round(0, "logs", None, None, "logs", {"success": Figure(math.nan, n=0), "episodes": Figure(3.0)})]
    assert "nan" not in rounds.picture(made)
    assert "nan" in rounds.line(made[0])

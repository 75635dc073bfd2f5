"""`evaluate suite=actors`: success by dynamic programming, and the whole suite on few logs."""

import contextlib
import importlib
import io
import json
from typing import Any

import numpy as np
import pytest

from offline_lm import _evaluate_actors, evaluate
from offline_lm.envs.exact import End, Go, TextMDP
from offline_lm.envs.shop import Site, Task, single_turn
from offline_lm.policy import Policy
from offline_lm.store import Store

SMALL = (
    "model=tiny model.vocab_size=400 model.width=32 model.layers=1 model.attention_heads=2 model.stage.tokens=1000"
    " optim.steps=5 optim.batch_size=64 optim.warmup=2 threads=1 logger=none"
    " actor.steps=6 actor.batch_size=64 actor.warmup=2 actor.lr=1e-3"
)


@pytest.fixture(scope="module")
def game():
    """A coin that is kept or thrown; four points win, three are an end too, and tails costs a throw."""
    moves = {
        ("start",): [("throw", [(0.5, Go(("ahead",), 1.0)), (0.3, ("start",)), (0.2, End(3.0))]), ("stop", End(0.0))],
        ("ahead",): [("throw", [(0.6, End(5.0)), (0.4, Go(("start",), 4.0))]), ("keep", End(4.0)), ("stop", End(1.0))],
    }
    return TextMDP.explore(
        ("start",), lambda s: (f"you are {s[0]}", moves[s]),
        benchmark="game", seed=0, number=0, goal="Win.", limit=3, success=4.0,
    )  # fmt: skip


TEXTS = {
    "you are start": {"throw": np.log(0.2), "stop": np.log(0.05)},
    "you are ahead": {"throw": np.log(0.06), "keep": np.log(0.03), "stop": np.log(0.01)},
}


class Reader:
    """A policy that reads: log-probabilities of texts on pages, which do not sum to one over the actions."""

    def logprobs(self, states):
        return [np.array([TEXTS[s["observation"]][a] for a in s["candidates"]]) for s in states]


READER: Any = Reader()


def test_success_within_the_limit_by_hand(game):
    """Ends of 4 or more, in three steps; the 4 of a step that goes on is no end, and counts for the return alone."""
    (policy,) = _evaluate_actors.acting(READER, 1.0)(game)
    np.testing.assert_allclose(policy, [[0.8, 0.2, 0], [0.6, 0.3, 0.1]])
    won = 0.6 * 0.6 + 0.3
    ahead, again = 0.8 * 0.5, 0.8 * 0.3
    assert game.success_rate(policy) == pytest.approx(ahead * won + again * ahead * won)
    assert game.success_rate(policy, 1) == 0
    assert game.success_rate(policy, 2) == pytest.approx(ahead * won)
    (sharper,) = _evaluate_actors.acting(READER, 0.5)(game)
    np.testing.assert_allclose(sharper, [[16 / 17, 1 / 17, 0], [36 / 46, 9 / 46, 1 / 46]])
    (likeliest,) = _evaluate_actors.acting(READER, 0)(game)
    assert likeliest.tolist() == [[1, 0, 0], [1, 0, 0]]


def test_success_and_return_agree_with_episodes_that_are_played(game):
    """Monte Carlo: texts in, actions out, by the rules as they were written down."""
    rng = np.random.default_rng(0)
    played, earned = [], []
    for _ in range(4000):
        at, total, won = "start", 0.0, False
        for _ in range(3):
            actions = ["throw", "stop"] if at == "start" else ["throw", "keep", "stop"]
            (logprobs,) = READER.logprobs([{"observation": f"you are {at}", "candidates": actions}])
            action = rng.choice(actions, p=np.exp(logprobs) / np.exp(logprobs).sum())
            if at == "start" and action == "throw":
                at, reward = [("ahead", 1.0), ("start", 0.0), (None, 3.0)][rng.choice(3, p=[0.5, 0.3, 0.2])]
            elif action == "throw":
                at, reward = [(None, 5.0), ("start", 4.0)][rng.choice(2, p=[0.6, 0.4])]
            else:
                at, reward = None, {"keep": 4.0, "stop": 0.0 if at == "start" else 1.0}[action]
            total += reward
            won = at is None and reward >= 4
            if at is None:
                break
        played.append(won)
        earned.append(total)
    found = _evaluate_actors.scores(_evaluate_actors.acting(READER, 1.0), [game], [game, game])
    assert found["success"] == found["success_train"]
    for sample, exactly in ((played, found["success"]), (earned, found["return"])):
        assert np.mean(sample) == pytest.approx(exactly, abs=3 * np.std(sample) / len(sample) ** 0.5)


def test_nothing_counts_as_success():
    task = TextMDP.explore(
        ("a",), lambda _: ("page", [("go", End(1.0))]), benchmark="b", seed=0, number=0, goal="", limit=1, success=None
    )
    with pytest.raises(ValueError, match="b0/0: nothing counts as success"):
        task.success_rate(np.ones((1, 1)))


def in_process(calls):
    """`command` without a process of its own: torch is imported already."""

    def command(name, *arguments):
        calls.append((name, arguments))
        return printed(importlib.import_module(f"offline_lm.{name}"), *arguments)[-1]

    return command


def printed(module, *arguments):
    """The lines that a command prints, the object at their end."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert module.main([*arguments, "json=true"]) == 0
    *lines, last = out.getvalue().splitlines()
    return [*lines, json.loads(last)]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Where the stores are, the commands that ran, the lines that were printed, and the object."""
    folder, calls = tmp_path_factory.mktemp("actors"), []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_evaluate_actors, "command", in_process(calls))
        *lines, result = printed(
            evaluate, "suite=actors", "seeds=[2]", "tasks=6", "episodes=4", f"workdir={folder}/work",
            f"store={folder}/store", f"overrides={SMALL}", "actors.train_tasks=3", "actors.horizons=[1]",
            "actors.algos=[awr,archer_ppo,reinforce]", 'actors.overrides={archer_ppo:"actor.steps=4"}',
        )  # fmt: skip
    return folder, calls, lines, result


def test_bc_and_each_critic_are_trained_once(measured):
    _, calls, _, result = measured
    fits = [arguments for name, arguments in calls if name == "fit"]
    assert [a[0] for a in fits] == [f"algo={n}" for n in ("bc", "filtered_bc", "awr", "archer_ppo", "reinforce")]
    runs = {row["algo"]: row for row in result["runs"]}
    *handed, last = [[a for a in own if a.startswith("actor.") and a not in SMALL] for own in fits]
    assert handed == [[], [], [], [f"actor.path=run:{runs['bc']['run_id']}", "actor.clone_first=0", "actor.steps=4"]]
    (shared,) = last  # reinforce takes archer_ppo's
    assert shared.startswith("actor.critic=critic_mc-")
    assert runs["reinforce"]["critic_seconds"] == runs["archer_ppo"]["critic_seconds"]
    assert runs["greedy_iql_lm"]["run_id"].startswith("iql_lm-")
    assert runs["greedy_iql_lm"]["critic_seconds"] == runs["awr"]["critic_seconds"]


def test_the_table_the_object_and_the_rows_say_the_same(measured):
    folder, _, lines, result = measured
    names = {"random", "behaviour", "optimum", "bc", "filtered_bc", "awr", "archer_ppo", "reinforce", "greedy_iql_lm"}
    assert set(result["success"]) == names
    with Store.open(folder / "store").connect() as db:
        rows = db.execute(
            "SELECT \"group\", name, split, value, n, extra FROM diagnostics WHERE run_id = ? AND suite = 'actors'",
            [result["measurement"]],
        ).fetchall()
    kept = {(algo, name, split): (value, n) for algo, name, split, value, n, _ in rows}
    assert len(kept) == len(rows)
    runs = {row["algo"]: row["run_id"] for row in result["runs"]}
    table = lines[lines.index(next(line for line in lines if line.startswith("horizon 1: "))) :]
    cells = {name.strip(): [c.strip() for c in rest] for name, *rest in (line.split("|") for line in table)}
    figures = result["horizons"]["1"]
    for algo, _, _, _, _, extra in rows:
        assert json.loads(extra) == {"horizon": 1, "seed": 2, "run_id": runs[algo]}
    for algo in names:
        value, n = kept[algo, "success", "held_out"]
        train, n_train = kept[algo, "success", "train"]
        assert (n, n_train) == (1, 3)
        assert value == figures["success"][algo] == result["success"][algo]
        assert train == figures["success_train"][algo]
        assert cells[algo][:2] == [f"{100 * value:.1f} ± 0.0", f"{100 * train:.1f} ± 0.0"]
        gains = [100 * (value - kept[than, "success", "held_out"][0]) for than in ("behaviour", "filtered_bc")]
        assert [float(cell.split()[0]) for cell in cells[algo][3:5]] == pytest.approx(gains, abs=0.051)
    assert figures["success"]["optimum"] == 1
    assert kept["archer_ppo", "approx_kl", "held_out"][0] == figures["approx_kl"]["archer_ppo"] > 0
    assert "awr" not in figures["approx_kl"]


def test_the_references_are_those_of_the_task_held_out(measured):
    folder, _, _, result = measured
    with Store.open(folder / "work" / "actors-shop_single2-6x4.store").connect() as db:
        ((held_out,),) = db.execute("SELECT DISTINCT task_id FROM run_values WHERE split = 'held_out'").fetchall()
    task = single_turn(Task(Site.draw(2), int(held_out.removeprefix("shop_single2/"))).mdp)
    skilled, poorer, careless, random = (task.success_rate(p) for p in task.behaviours().values())
    success = result["success"]
    assert success["behaviour"] == pytest.approx((skilled + poorer + careless + random) / 4)
    assert success["random"] == pytest.approx(random)
    assert success["random"] < success["behaviour"] < 1


def test_the_logs_of_two_policies_and_of_a_longer_way():
    """Of two episodes a task, the first two policies made the logs."""
    (task,) = _evaluate_actors._tasks(0, 6, 1)
    assert (task.task_id, task.limit) == ("shop0h6/0", 18)
    found = _evaluate_actors.scores(_evaluate_actors._references(2)["behaviour"], [task], [task])
    skilled, poorer, *_ = task.behaviours().values()
    assert found["success"] == pytest.approx((task.success_rate(skilled) + task.success_rate(poorer)) / 2)


def test_a_language_model_acts_on_every_page_as_it_does_on_one(shop):
    actor = Policy(shop.model, shop.tokenizer, {"max_tokens": 400, "history": 0, "context": "actions"})
    task = Task(Site.draw(0), 1).mdp
    (policy,) = _evaluate_actors.acting(actor, 2.0)(task)
    np.testing.assert_allclose(policy.sum(axis=1), 1)
    assert (policy[~task.valid] == 0).all()
    for s in (0, 7, len(task.pages) - 1):
        page = {"goal": task.goal, "observation": task.pages[s], "history": ["any past"]}
        choice = actor.act(page, candidates=task.actions[s], temperature=2.0)
        np.testing.assert_allclose(policy[s, : len(choice.logprobs)], np.exp(choice.logprobs), rtol=1e-4)


def test_means_and_gains_by_hand():
    def site(horizon, seed, **success):
        rows = [{"horizon": horizon, "seed": seed, "algo": algo, "success": x} for algo, x in success.items()]
        return _evaluate_actors._with_gains(rows)

    rows = [
        *site(5, 0, behaviour=0.5, filtered_bc=0.625, awr=0.75),
        *site(5, 1, behaviour=0.25, filtered_bc=0.5, awr=1.0),
    ]
    rows[2]["seconds"] = 7.0
    found = _evaluate_actors._means(rows)
    assert found["success"] == {"behaviour": 0.375, "filtered_bc": 0.5625, "awr": 0.875}
    assert found["success_std"]["awr"] == 0.125
    assert found["gain_behaviour"] == {"behaviour": 0, "filtered_bc": 18.75, "awr": 50}
    assert found["gain_filtered_bc"]["awr"] == 31.25
    assert found["gain_filtered_bc_std"]["awr"] == 18.75
    assert found["seconds"] == {"awr": 7}
    assert "return" not in found


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("actors.algos=[iql_lm]", "actors.algos: iql_lm trains no actor"),
        ("actors.algos=[bcc]", "no algo=bcc; there are"),
        ("actors.horizons=[1,4]", "1 and whole numbers from 5 are wanted"),
        ("actors.temperature=-1", "actors.temperature=-1: a number from 0 is wanted"),
        ("actors.train_tasks=0", "actors.train_tasks=0: null or a whole number from 1"),
        ("runs=latest", "leave runs= out"),
        ("overrides=data.history=2", "data.history=2: suite=actors computes the success of what reads the page alone"),
        ('actors.overrides={awr:"actor.steps=2"}', "actors.overrides has awr, which actors.algos=['bc'] lacks"),
        ('actors.overrides={bc:"data.held_out=0.3"}', "hold for all algorithms: set them in overrides="),
    ],
)
def test_mistakes_are_told_before_the_work(tmp_path, capsys, setting, told):
    assert evaluate.main(["suite=actors", "actors.algos=[bc]", f"store={tmp_path}/store", setting]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "store").exists()

"""Episodes of text environments, from the command line into the store; no browser is needed."""

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from offline_lm import _collect_models as models
from offline_lm import collect
from offline_lm._collect_policies import named
from offline_lm._collect_rollout import Batcher, Plan, Setting, play
from offline_lm._collect_rollout import collect as collect_episodes
from offline_lm.envs import sites
from offline_lm.envs.policies import Chooser, State, Turn, uniform
from offline_lm.envs.protocol import Lost, Page, Transition
from offline_lm.envs.written import Judge
from offline_lm.store import Store
from offline_lm.types import Episode

LOGGED = """SELECT e.task_id, e.seed, e.end_reason, e.terminated, e.truncated, e.success, e.outcome_reward, s.step,
    s.observation, s.action, s.reward, s.terminated, s.truncated, s.behavior_logprob, s.candidates::VARCHAR
    FROM episodes e JOIN steps s USING (episode_id) ORDER BY e.task_id, e.seed, s.step"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*argv: str, code: int = 0):
        assert collect.main([*argv, "json=true"]) == code
        out, err = capsys.readouterr()
        return err if code else json.loads(out.splitlines()[-1])

    return run


def logged(store: str) -> list[tuple]:
    with Store.open(store).connect() as db:
        return db.execute(LOGGED).fetchall()


def test_what_is_logged_replays_exactly(run):
    """The site's own rules give the same reward and next page; probabilities are those that were drawn from."""
    told = run("env=shop", "policy=random", "episodes=6", "tasks=3", "store=a", "pages=2")
    assert (told["episodes"], told["duplicates"], told["quarantined"]) == (6, 0, 0)
    with Store.open("a").connect() as db:
        steps = db.execute(
            "SELECT task_id, step, observation, action, reward, s.terminated, s.truncated, behavior_logprob,"
            " candidates, candidates_complete, is_final_observation, e.end_reason, s.extra"
            " FROM steps s JOIN episodes e USING (episode_id) ORDER BY episode_id, step"
        ).fetchall()
        ends = db.execute("SELECT terminated, truncated, end_reason, n_steps, success FROM episodes").fetchall()
    assert sum(not final for *_, final, _, _ in steps) == told["steps"]
    at: dict[int, int] = {}
    for (
        task,
        step,
        page,
        action,
        reward,
        terminated,
        truncated,
        logprob,
        candidates,
        complete,
        final,
        end,
        extra,
    ) in steps:
        mdp = sites.named(task)
        s = at[step] if step else int(mdp.start.argmax())
        assert page == mdp.pages[s]
        if final:
            assert (action, candidates, reward) == (None, None, None)
            continue
        a = mdp.actions[s].index(action)
        assert (reward, complete) == (mdp.reward[s, a], True)
        assert [c["action"] for c in candidates] == mdp.actions[s]
        assert [c["executed"] for c in candidates] == [i == a for i in range(len(candidates))]
        assert logprob == pytest.approx(-math.log(len(candidates)))
        assert all(c["logprob"] == logprob for c in candidates)
        after = int(mdp.next[s, a])
        assert terminated == (after == -1)
        assert truncated == (after >= 0 and step == mdp.limit - 1)
        assert end == ("env_done" if terminated else end)
        assert json.loads(extra)["seeds"][3] == step
        at = {step + 1: after}
    assert {row[:3] for row in ends} <= {(True, False, "env_done"), (False, True, "step_limit")}
    assert all(success is not None for *_, success in ends)


def test_order_and_number_of_pages_change_nothing(run):
    args = ("env=shop", "policy=random", "episodes=8", "tasks=4", "seed=3")
    run(*args, "store=one", "pages=1")
    run(*args, "store=four", "pages=4")
    assert logged("one") == logged("four")
    run(*args, "store=other", "pages=1", "seed=4")
    assert logged("one") != logged("other")
    run(*args, "store=fewer", "tasks=2", "episodes=4")
    assert set(logged("fewer")) < set(logged("one"))


def test_the_same_command_goes_on_where_it_stopped(run):
    args = ("env=shop", "policy=random", "tasks=2", "store=a")
    assert run(*args, "episodes=3")["episodes"] == 3
    before = logged("a")
    told = run(*args, "episodes=5")
    assert (told["episodes"], told["skipped"], told["quarantined"]) == (2, 3, 0)
    assert set(before) < set(logged("a"))
    assert run(*args, "episodes=2", "seed=1")["episodes"] == 2  # another policy's randomness: other episodes


def test_a_step_limit_truncates(run):
    run("env=shop", "policy=random", "episodes=4", "max_steps=2", "store=a")
    with Store.open("a").connect() as db:
        rows = db.execute(
            "SELECT DISTINCT end_reason, terminated, truncated, success, n_steps FROM episodes"
        ).fetchall()
        last = db.execute("SELECT DISTINCT terminated, truncated FROM steps WHERE step = 1").fetchall()
    assert rows == [("step_limit", False, True, False, 2)]
    assert last == [(False, True)]


def test_a_gymnasium_game(run):
    told = run("env=gym:FrozenLake-v1", "policy=random", "episodes=3", "store=a")
    rows = logged("a")
    assert {row[0] for row in rows} == {"FrozenLake-v1"}
    assert told["steps"] == sum(row[9] is not None for row in rows)
    assert "SFFF" in rows[0][8].replace("\x1b[41m", "").replace("\x1b[0m", "")
    assert {row[9] for row in rows} <= {"0", "1", "2", "3", None}


def test_reranking_by_a_critic(run, monkeypatch):
    """A critic whose Q is the true one earns what the best policy earns; its scores are logged."""
    tasks = [sites.named(f"shop0/{n}") for n in range(3)]

    def values(states):
        return [value(state) for state in states]

    def value(state):
        (mdp,) = [m for m in tasks if m.goal == state["goal"]]
        s = mdp.pages.index(state["observation"])
        assert list(state["candidates"]) == mdp.actions[s]
        return mdp.optimal(0.9)[1][s, : len(mdp.actions[s])]

    monkeypatch.setattr(models, "kind_of", lambda run, store: (Path("runs", run), "critic"))
    monkeypatch.setattr(models, "judge", lambda *_: Judge("best", "best@0", "actions", values))
    assert run("env=shop", "policy=run:best", "episodes=3", "tasks=3", "store=a", "epsilon=0.0")["success"] == 1.0
    with Store.open("a").connect() as db:
        found = db.execute(
            "SELECT DISTINCT policy_id, policy_kind, model, sampling.temperature FROM episodes"
        ).fetchall()
        rows = db.execute("SELECT candidates, behavior_logprob FROM steps WHERE action IS NOT NULL").fetchall()
    assert found == [("q-best-once", "search", "best@0", 0.0)]
    for candidates, logprob in rows:
        best = max(candidates, key=lambda c: c["score"])
        assert (best["executed"], logprob) == (True, 0.0)
    q = named("run:best", epsilon=0.5, temperature=0.1, store="a", env="shop")
    assert q.policy_id == "q-best-t0.1-once-eps0.5"
    assert named("run:best", repeats=True, store="a", env="shop").policy_id == "q-best"
    assert q.sampling == {"over": "candidates", "epsilon": 0.5, "temperature": 0.1}


def test_a_critic_that_goes_round_in_a_circle_is_led_out_of_it():
    """What was done on a page that reads the same is not done again, while anything else is left."""
    critic = Judge("best", "best@0", "actions", lambda states: [np.array([2.0, 1.0, 0.0]) for _ in states])

    def chances(turns, repeats=False):
        state = State("Buy", "page", ("a", "b", "c"), np.random.default_rng(0), turns=tuple(turns))
        chooser = models.ranked(critic, epsilon=0.0, temperature=0.0, repeats=repeats)
        (choice,) = chooser.act([state])
        assert [c.score for c in choice.candidates] == [2.0, 1.0, 0.0]
        assert [c.logprob for c in choice.candidates if c.executed] == [choice.logprob] == [0.0]
        return choice.action

    assert chances([]) == "a"
    assert chances([Turn("page", "a"), Turn("other page", "b")]) == "b"
    assert chances([Turn("page", "a"), Turn("page", "b")]) == "c"
    assert chances([Turn("page", action) for action in "abc"]) == "a"
    assert chances([Turn("page", "a", url="http://elsewhere.test/")]) == "a"
    assert chances([Turn("page", "a")], repeats=True) == "a"
    # probabilities among what is left are those of its own softmax
    warm = models.ranked(critic, epsilon=0.0, temperature=1.0, repeats=False)
    state = State("Buy", "page", ("a", "b", "c"), np.random.default_rng(0), turns=(Turn("page", "a"),))
    (choice,) = warm.act([state])
    left = [c.logprob for c in choice.candidates]
    assert left[0] is None
    assert left[1:] == pytest.approx(np.log(np.exp([1.0, 0.0]) / np.exp([1.0, 0.0]).sum()).tolist())


def test_what_a_mixture_draws_from_is_logged(run):
    run("env=shop", "policy=random", "episodes=1", "store=a", "seed=3")
    with Store.open("a").connect() as db:
        rows = db.execute("SELECT model, sampling.seed, extra ->> '$.sampling.epsilon' FROM episodes").fetchall()
    assert rows == [(None, 3, "0.0")]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "env= must be given"),
        (("env=nope",), "env=nope: there are miniwob, shop"),
        (("env=shop", "policy=best"), "policy=best: there are random, scripted, run:RUN"),
        (("env=shop", "policy=scripted", "epsilon=2"), "epsilon=2: a chance from 0 to 1"),
        (("env=shop", "policy=random", "repeats=1"), "repeats=1: true or false is wanted"),
        (("env=shop", "policy=random", "n=4"), "policy=random writes none"),
        (("env=shop", "policy=scripted"), "its rules are for env=miniwob, not env=shop"),
        (("env=shop", "episodes=0"), "episodes=0: a whole number from 1"),
        (("env=shop", "tasks=[house/1]"), "house/1: not the name of a task"),
        (("env=gym:Nope-v0",), "env=gym:Nope-v0"),
        (("env=gym:CartPole-v1",), "shows no text"),
        (("env=miniwob", "miniwob_html=here"), "fetch=miniwob"),
        (("fetch=webarena",), "fetch=webarena: there is miniwob"),
    ],
)
def test_mistakes_are_told(run, argv, message):
    assert message in run(*argv, code=2)


# -- what goes wrong -------------------------------------------------------------------------------------------


class Dying:
    """Dies under the `dies`-th action of each episode, and does not begin the first `late` times."""

    benchmark, grammar, tasks, limit = "dying", "none", ["t"], 10

    def __init__(self, dies: int, late: int = 0) -> None:
        self.dies, self.late, self.steps, self.closed = dies, late, 0, 0

    async def reset(self, task, seed):
        if self.late:
            self.late -= 1
            raise Lost("not yet")
        return Page("goal", "page", "text", ("x", "y"))

    async def step(self, action):
        self.steps += 1
        if self.steps == self.dies:
            raise Lost("the browser is gone")
        error = "y fails" if action == "y" else None
        return Transition(Page("goal", f"page {self.steps}", "text", ("x", "y")), 0.5, False, False, error)

    async def close(self):
        self.closed += 1


def episode_of(env) -> Episode:
    policy = Chooser("random", uniform)

    async def act(state: State):
        return policy.act([state])[0]

    return asyncio.run(play(env, Plan("t", 0, 0, "t/0"), act, Setting(policy, None)))


def test_a_crash_cuts_the_episode_and_is_no_reward():
    env = Dying(dies=3, late=2)
    episode = episode_of(env)
    assert env.closed == 3
    assert [step.reward for step in episode.steps] == [0.5, 0.5, None]
    assert [step.truncated for step in episode.steps] == [False, False, True]
    assert not any(step.terminated for step in episode.steps)
    last = episode.steps[-1]
    assert (last.action_error, last.action_valid) == ("the browser is gone", None)
    assert (episode.end_reason, episode.terminated, episode.truncated) == ("env_error", False, True)
    assert (episode.outcome_reward, episode.success) == (None, None)


def test_a_failed_action_is_a_transition():
    episode = episode_of(Dying(dies=0))
    acted = [step for step in episode.steps if not step.is_final_observation]
    assert len(acted) == 10
    assert {(step.action, step.action_error, step.action_valid) for step in acted} == {
        ("x", None, True),
        ("y", "y fails", False),
    }
    assert all(step.reward == 0.5 for step in acted)
    assert (episode.outcome_reward, episode.end_reason) == (5.0, "step_limit")
    assert (episode.steps[-1].observation, episode.steps[-1].is_final_observation) == ("page 10", True)


def test_an_environment_that_never_begins_is_given_up():
    with pytest.raises(Lost):
        episode_of(Dying(dies=0, late=3))


def test_a_page_without_an_action():
    """The first one is tried again; a later one ends the episode, and that is no step limit."""

    class Mute(Dying):
        mute, resets = 0, 0

        async def reset(self, task, seed):
            self.resets += 1
            page = await super().reset(task, seed)
            return replace(page, actions=()) if self.resets <= self.mute else page

        async def step(self, action):
            done = await super().step(action)
            return done._replace(page=replace(done.page, actions=())) if self.steps == 2 else done

    env = Mute(dies=0)
    env.mute = 2
    episode = episode_of(env)
    assert (env.resets, env.closed) == (3, 2)
    assert (episode.end_reason, episode.truncated, episode.success) == ("unknown", True, False)
    assert [step.reward for step in episode.steps] == [0.5, 0.5, None]
    assert episode.steps[-1].is_final_observation
    env.mute = 9
    with pytest.raises(Lost, match="t offers no action on its first page"):
        episode_of(env)


def test_a_policy_is_asked_about_all_pages_that_wait():
    sizes = []

    class Slow(Chooser):
        def act(self, states):
            sizes.append(len(states))
            time.sleep(0.02)
            return super().act(states)

    async def run():
        policy = Slow("random", uniform)
        batcher = Batcher(policy)
        serving = asyncio.create_task(batcher.run())
        kept = []

        async def keep(episode):
            kept.append(episode)

        plans = iter([Plan("t", i, 0, f"t/{i}") for i in range(6)])
        await collect_episodes([Dying(dies=0) for _ in range(3)], plans, batcher.act, Setting(policy, None), keep)
        serving.cancel()
        return kept

    kept = asyncio.run(run())
    assert sorted(episode.seed for episode in kept) == list(range(6))
    assert sum(sizes) == 60
    assert np.mean(sizes) > 2.5


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_signal_loses_none_that_ended(tmp_path, number):
    """Whatever was acknowledged is there, whole, and the next run completes it."""
    command = [sys.executable, "-m", "offline_lm.collect", "env=shop", "policy=random", "episodes=3000", "tasks=2"]
    process = subprocess.Popen(
        [*command, "store=a"], cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=environment()
    )
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("a/tables/episodes/_delta_log/*.json"))) < 4:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    with Store.open(tmp_path / "a").connect() as db:
        rows = db.execute(
            "SELECT n_steps, (SELECT count(*) FROM steps s WHERE s.episode_id = e.episode_id AND action IS NOT NULL)"
            " FROM episodes e"
        ).fetchall()
    assert len(rows) >= 3
    assert all(told == there for told, there in rows)
    if number == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM
        assert "stopped by SIGTERM: what was under way is dropped" in out
        assert f"{len(rows)} episodes, {sum(n for n, _ in rows)} steps added" in out


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(collect.__file__).parent.parent)}

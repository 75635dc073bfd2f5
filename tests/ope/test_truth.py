"""Exact truth: what perfect and reversed critics score, and that the sample in datasets/ is what its recipe says."""

import gzip
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest
import yaml

from offline_lm.envs import maze, office, shop
from offline_lm.logs import jsonl
from offline_lm.ope.truth import exact
from offline_lm.paths import CONF
from offline_lm.types import Episode

GAMMA, TAU = 0.95, 0.8
SAMPLE = CONF.parent / "datasets" / "shop"


@pytest.fixture(scope="module", params=[shop, office], ids=["shop", "office"])
def tasks(request):
    site = request.param
    return [site.Task(site.Site.draw(0), n).mdp for n in (100, 101, 102)]


class Oracle:
    """A critic that knows the numbers: it is asked about the states of a task in order. `sign` turns orders round."""

    def __init__(self, tasks, *, sign=1.0, tau: float | None = TAU, constant=None, own=False, off=0.0):
        self.known = {}
        for task in tasks:
            _, q = task.optimal(GAMMA)
            mixture = task.mixture()
            v, q_own = task.evaluate(mixture, GAMMA) if tau is None else task.expectile(mixture, GAMMA, tau)
            q = q_own + off if own else q
            known = self.known[task.goal] = []
            for s, valid in enumerate(task.valid):
                scores = sign * q[s, valid] if constant is None else np.full(valid.sum(), constant)
                score = SimpleNamespace(v=float(sign * v[s]), q=scores.tolist())
                known.append((task.pages[s], task.actions[s], score))

    def score(self, states):
        (goal,) = {state["goal"] for state in states}
        for state, (page, actions, score) in zip(states, self.known[goal], strict=True):
            assert (state["observation"], state["candidates"]) == (page, actions)
            yield score


def estimand(tau) -> dict[str, Any]:
    return {"estimand": "behaviour"} if tau is None else {"estimand": "expectile", "tau": tau}


@pytest.mark.parametrize("tau", [TAU, None])
def test_a_perfect_critic_scores_one(tasks, tau):
    scores = exact(Oracle(tasks, tau=tau), tasks, gamma=GAMMA, **estimand(tau))
    for name in ("kendall", "hit", "spearman_v", "spearman_v_pooled", "gap_recovered"):
        assert scores[name] == pytest.approx(1.0), name
    assert scores["greedy"] == scores["greedy_once"] == pytest.approx(scores["optimum"]) == 1.0
    assert scores["gap_once"] == pytest.approx(1.0)
    assert 0 < scores["behaviour"] < 0.6


@pytest.mark.parametrize("tau", [TAU, None])
def test_errors_and_signs_are_of_what_the_critic_estimates(tasks, tau):
    scores = exact(Oracle(tasks, tau=tau, own=True), tasks, gamma=GAMMA, **estimand(tau))
    assert scores["rmse_v"] == scores["rmse_q"] == 0.0
    assert scores["sign"] == 1.0
    raised = exact(Oracle(tasks, tau=tau, own=True, off=0.1), tasks, gamma=GAMMA, **estimand(tau))
    assert raised["rmse_q"] == pytest.approx(0.1)
    assert raised["rmse_v"] == 0.0
    assert raised["sign"] < 1.0  # actions a little below V now look better than it
    none = exact(Oracle(tasks, tau=tau, own=True, off=-9.0), tasks, gamma=GAMMA, **estimand(tau))
    better = exact(Oracle(tasks, tau=tau, own=True, off=9.0), tasks, gamma=GAMMA, **estimand(tau))
    assert none["sign"] + better["sign"] == pytest.approx(1.0)


def test_a_critic_of_the_optimum_is_held_against_it(tasks):
    scores = exact(Oracle(tasks), tasks, gamma=GAMMA, estimand="optimum")
    assert scores["rmse_q"] == 0.0
    assert scores["rmse_v"] > 0.05  # its V is the expectile's


def test_v_is_held_against_the_value_that_it_estimates(tasks):
    """V of the behaviour is not the expectile's fixed point: each is judged by its own."""
    scores = exact(Oracle(tasks, tau=None), tasks, gamma=GAMMA, estimand="expectile", tau=TAU)
    assert 0.5 < scores["spearman_v"] < 0.9999


def test_a_reversed_critic_scores_minus_one(tasks):
    scores = exact(Oracle(tasks, sign=-1.0), tasks, gamma=GAMMA, estimand="expectile", tau=TAU)
    for name in ("kendall", "spearman_v", "spearman_v_pooled"):
        assert scores[name] == pytest.approx(-1.0), name
    assert scores["hit"] < 0.1
    assert scores["greedy"] == 0.0
    behaviour, optimum = scores["behaviour"], scores["optimum"]
    assert scores["gap_recovered"] == pytest.approx(-behaviour / (optimum - behaviour))


def test_a_critic_that_cannot_tell_actions_apart_orders_none(tasks):
    scores = exact(Oracle(tasks, constant=0.5), tasks, gamma=GAMMA, estimand="expectile", tau=TAU)
    assert scores["kendall"] == 0.0
    assert 0 < scores["hit"] < 1


@pytest.mark.filterwarnings("error")
def test_a_constant_v_has_no_rank_correlation(tasks):
    scores = exact(Oracle(tasks, sign=0.0), tasks, gamma=GAMMA, estimand="optimum")
    assert math.isnan(scores["spearman_v"])
    assert math.isnan(scores["spearman_v_pooled"])


@pytest.fixture(scope="module")
def recipe():
    return yaml.safe_load((SAMPLE / "source.yaml").read_text())


def test_the_sample_is_what_its_recipe_gives(recipe):
    tasks = [shop.Task(shop.Site.draw(recipe["site_seed"]), n) for n in range(recipe["tasks"])]
    made = shop.record(tasks, recipe["episodes_per_task"], recipe["seed"])
    with gzip.open(SAMPLE / recipe["file"]) as lines:
        for line, episode in zip(lines, made, strict=True):
            logged, episode = orjson.loads(line), orjson.loads(orjson.dumps(episode))
            for step in (*logged["steps"], *episode["steps"]):
                step["behavior_logprob"] = round(step["behavior_logprob"], 9)  # libms differ in the last digit
            assert logged == episode


def test_every_record_of_the_sample_is_read_and_the_card_counts_them_right(recipe):
    records = list(jsonl.read(SAMPLE / recipe["file"]))
    episodes = [e for e in records if isinstance(e, Episode)]
    assert len(episodes) == len(records)
    assert all(not e.quality_flags for e in episodes)
    assert len(episodes) == recipe["tasks"] * recipe["episodes_per_task"]
    decisions = sum(not step.is_final_observation for e in episodes for step in e.steps)
    card = (SAMPLE / "README.md").read_text()
    assert f"{len(episodes):,} episodes ({decisions:,} decisions" in card
    assert f"{sum(e.success is True for e in episodes)} episodes succeed" in card
    assert f"{sum(e.outcome_reward == 0.3 for e in episodes)} more bought the right product" in card
    assert f"{sum(e.truncated is True for e in episodes)} end at the limit" in card
    for policy in {e.policy_id for e in episodes}:
        own = [e for e in episodes if e.policy_id == policy]
        assert f"| `{policy}` | {len(own)} | {sum(e.success is True for e in own)} |" in card


def test_a_policy_that_reads_transcripts_is_played_on_them():
    """The best action by belief, told from the transcript, earns the optimum; a fixed one what its walls let it."""
    task = maze.partially_observed()
    _, q_star = task.optimal(GAMMA)

    def belief(page):
        """The state that a transcript tells: the cells from which the same walls would have been felt."""
        first, *turns = page.split("\n")
        cells = [cell for cell in maze.STARTS if maze.walls(cell) == first]
        for action, felt in zip(turns[::2], turns[1::2], strict=True):
            cells = [maze.step(cell, action.removeprefix("move ")) for cell in cells]
            cells = [cell for cell in cells if cell != maze.GOAL and maze.walls(cell) == felt]
        return task.states.index(tuple(sorted(cells)))

    class Reader:
        def __init__(self, known):
            self.known = known

        def score(self, states):
            for state in states:
                values = q_star[belief(state["observation"])] if self.known else np.zeros(len(state["candidates"]))
                yield SimpleNamespace(v=float(np.max(values)), q=list(map(float, values)))

    known = exact(Reader(True), [task], gamma=GAMMA, estimand="optimum")
    blind = exact(Reader(False), [task], gamma=GAMMA, estimand="optimum")
    assert task.transcripts
    assert known["optimum"] == pytest.approx(-7.24)
    assert known["greedy"] == pytest.approx(known["optimum"])
    assert blind["greedy"] == pytest.approx(-101)  # who only ever moves left comes nowhere
    assert not shop.Task(shop.Site.draw(0), 1).mdp.transcripts

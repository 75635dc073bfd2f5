"""The maze against ways counted by hand, against plain simulation, and beliefs against histories."""

from collections import defaultdict

import numpy as np
import orjson
import pytest

from offline_lm.envs import exact, maze
from offline_lm.envs.play import play_texts
from offline_lm.logs.jsonl import read
from offline_lm.types import Episode

MOVES = ["move left", "move right", "move up", "move down"]
WAYS = {  # moves to the goal, row by row, read off the map
    (7, 6): 1, (6, 6): 2, (5, 6): 3, (5, 5): 4, (5, 7): 4, (5, 4): 5, (5, 8): 5, (5, 3): 6, (5, 9): 6,
    (4, 3): 7, (4, 9): 7, (3, 3): 8, (3, 9): 8, (2, 3): 9, (2, 9): 9, (1, 3): 10, (1, 9): 10,
    (1, 2): 11, (1, 4): 11, (1, 8): 11, (1, 10): 11, (1, 1): 12, (1, 5): 12, (1, 7): 12, (1, 11): 12,
}  # fmt: skip


@pytest.fixture(scope="module")
def full():
    return maze.fully_observed()


@pytest.fixture(scope="module")
def partial():
    return maze.partially_observed()


def best(task):
    return task.greedy(task.optimal(1.0)[1])


def uniform(task):
    return task.greedy(task.reward, 1.0)


# -- fully observed --------------------------------------------------------------------------------------------


def test_the_optimum_is_that_of_the_paper(full):
    assert full.states == sorted(WAYS)
    v, q = full.optimal(1.0)
    assert v.tolist() == [1 - WAYS[cell] for cell in full.states]
    assert full.play(full.greedy(q)) == pytest.approx(-6.84, abs=1e-12)
    assert full.play(full.greedy(q)) == pytest.approx(1 - np.mean(list(WAYS.values())))
    for s, cell in enumerate(full.states):  # a move along the way is best, one into a wall costs itself
        for a, move in enumerate(MOVES):
            to = maze.step(cell, move.removeprefix("move "))
            assert q[s, a] == (0 if to == maze.GOAL else -WAYS[to])


def test_the_page_names_the_cell_and_its_walls(full):
    assert full.actions == [MOVES] * 25
    page = full.pages[full.states.index((5, 8))]
    assert page == "You are in row 5, column 8. The goal is in row 8, column 6.\nWalls: up, down."
    assert len(set(full.pages)) == 25


def test_random_walks_by_solving_and_by_pushing_probability(full):
    matrix, cost = np.zeros((25, 25)), np.zeros(25)
    for s, cell in enumerate(full.states):
        for move in ("left", "right", "up", "down"):
            to = maze.step(cell, move)
            if to != maze.GOAL:
                matrix[s, full.states.index(to)] += 0.25
                cost[s] -= 0.25
    v, _ = full.evaluate(uniform(full), 0.97)
    np.testing.assert_allclose(v, np.linalg.solve(np.eye(25) - 0.97 * matrix, cost), atol=1e-9)
    at, total = np.full(25, 1 / 25), 0.0
    for _ in range(101):
        total += at @ cost
        at = at @ matrix
    assert full.play(uniform(full)) == pytest.approx(total, abs=1e-9)


def test_the_data_is_near_random(full, partial):
    for task in (full, partial):
        returns = [task.play(policy) for policy in task.behaviours().values()]
        assert np.mean(returns) == pytest.approx(-83, abs=1.5)  # the paper's data
        assert returns[0] == pytest.approx(-85.891, abs=1e-3)


# -- partially observed ----------------------------------------------------------------------------------------


def test_who_ignores_what_is_seen_earns_the_same_in_both(full, partial):
    for limit in (1, 7, 101):
        assert partial.play(uniform(partial), limit) == pytest.approx(full.play(uniform(full), limit), abs=1e-9)


def test_the_value_of_a_belief_is_the_mean_over_its_cells(full, partial):
    """For a policy that takes each move as often everywhere, the cell decides alone."""
    (v, q), (v_full, q_full) = (task.evaluate(uniform(task), 0.99) for task in (partial, full))
    for s, belief in enumerate(partial.states):
        at = [full.states.index(cell) for cell in belief]
        assert v[s] == pytest.approx(v_full[at].mean(), abs=1e-9)
        np.testing.assert_allclose(q[s], q_full[at].mean(axis=0), atol=1e-9)


def feel(cells):
    """Cells, as often as they are possible, parted by what is felt there."""
    parts = defaultdict(list)
    for cell in cells:
        if cell != maze.GOAL:
            parts[maze.walls(cell)].append(cell)
    return parts.values()


def by_histories(cells, steps):
    """Total reward of the best policy of histories over the given cells: no belief is formed or looked up."""
    if not cells or steps == 0:
        return 0.0
    options = []
    for move in ("left", "right", "up", "down"):
        to = [maze.step(cell, move) for cell in cells]
        parts = list(feel(to))
        options.append(sum(-len(part) + by_histories(part, steps - 1) for part in parts))
    return max(options)


def test_beliefs_are_worth_what_histories_are(partial):
    for steps in (1, 3, 5):
        v = np.zeros(len(partial.states))
        for _ in range(steps):
            v = np.nanmax(partial.backup(v, 1.0), axis=1)
        want = sum(by_histories(part, steps) for part in feel(maze.STARTS)) / 25
        assert partial.start @ v == pytest.approx(want, abs=1e-12)


def test_the_optimum_without_sight(partial):
    assert len(partial.states) == 44
    assert partial.play(best(partial)) == pytest.approx(-7.24, abs=1e-12)
    # between two walls the way may be left or right: whoever must find out loses against who knows
    v, _ = partial.optimal(1.0)
    arms = [(1, 2), (1, 4), (1, 8), (1, 10), (5, 4), (5, 5), (5, 7), (5, 8)]
    s = partial.states.index(tuple(arms))
    assert partial.pages[s] == "Walls: up, down."
    assert v[s] < np.mean([1 - WAYS[cell] for cell in arms]) - 0.5


def reader(states):
    """A policy of the text: down where it can, else on as it went, else back."""
    moves = []
    for state in states:
        felt = state["observation"].split("\n")[-1]
        went = state["history"][-1] if state["history"] else "move left"
        back = {"move left": "move right", "move right": "move left"}.get(went, "move left")
        if "down" not in felt:
            moves.append("move down")
        else:
            moves.append(back if went.removeprefix("move ") in felt else went)
    return [MOVES.index(move) for move in moves]


def test_a_policy_that_reads_earns_what_it_earns_from_each_start(partial):
    total = 0.0
    for cell in maze.STARTS:
        past = []
        for _ in range(101):
            (a,) = reader([{"observation": maze.walls(cell), "history": past}])
            past.append(MOVES[a])
            cell = maze.step(cell, MOVES[a].removeprefix("move "))
            if cell == maze.GOAL:
                break
            total -= 1
    assert total == -189
    assert play_texts(partial, reader) == pytest.approx(total / 25)


# -- logs ------------------------------------------------------------------------------------------------------


def replay(cell, actions):
    """What is felt from a start on, and whether the goal is come to at the end."""
    felt = [maze.walls(cell)]
    for action in actions:
        cell = maze.step(cell, action.removeprefix("move "))
        felt.append(maze.walls(cell))
    return felt, cell == maze.GOAL


def test_transcripts_are_those_of_real_walks(partial):
    for episode in exact.record([partial], 30, seed=1):
        actions = [step["action"] for step in episode["steps"]]
        pages = [step["observation"] for step in episode["steps"]]
        pages += [] if episode["success"] else [episode["final_observation"]]
        possible = []
        for cell in maze.STARTS:
            felt, home = replay(cell, actions)
            lines = [felt[0], *(line for turn in zip(actions, felt[1:], strict=True) for line in turn)]
            shown = ["\n".join(lines[: 2 * t + 1][-maze.LINES :]) for t in range(len(pages))]
            possible.append(shown == pages and home == episode["success"])
        assert any(possible)


def test_rewards_as_in_the_paper_and_logs_are_read(tmp_path, full, partial):
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"\n".join(map(orjson.dumps, exact.record([full, partial], 12))))
    episodes = list(read(log))
    assert {e.success for e in episodes if isinstance(e, Episode)} == {True, False}
    for e in episodes:
        assert isinstance(e, Episode)
        assert e.quality_flags == (("success_without_reward",) if e.success else ())  # its reward is 0, all others less
        rewards = [s.reward for s in e.steps if not s.is_final_observation]
        assert rewards == [-1.0] * (len(rewards) - 1) + [0.0 if e.success else -1.0]
        assert e.success == e.terminated == (not e.truncated)
        assert e.outcome_reward == sum(r for r in rewards if r is not None)
        assert e.success or e.outcome_reward == -101

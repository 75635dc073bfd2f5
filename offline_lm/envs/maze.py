"""The maze of LMRL-Gym, fully and partially observed, with exact values.

The facts are those of Abdulhai et al. 2023 (arXiv 2311.18232) and its repository: two T-shaped corridors join above the
goal, 25 other cells to start from, each equally likely; four moves; a move earns -1 and one onto the goal 0, which
ends the episode; a move into a wall stays and earns -1 too; after 100 moves one more -1 and the end. The paper's -4 for
words that are no move cannot occur: actions are chosen among the four. Sentences and code are ours.

- `fully_observed`: the page names the cell. The optimum is -6.84, the mean way to the goal but one.
- `partially_observed`: the page is the transcript of moves made and walls felt, the newest 20 turns of it. The states
  are beliefs, the cells that the whole transcript leaves possible; there are 44. Values are therefore exact for every
  policy of the transcript that belief suffices for, the optimum (-7.24) and all behaviours here among them; what a
  policy gets that knows the cell is `fully_observed`.

Returns to compare with, means over the starts: behaviour cloning -72.1, Monte Carlo -48.1, ILQL -6.97 fully
observed and -52.9 partially.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from offline_lm.envs.exact import End, Go, Move, Outcome, State, TextMDP, View

FULLY, PARTIALLY = "fo_maze", "po_maze"
STEP_LIMIT = 101
"""The paper's 100 moves, and the -1 of failure that follows them: an episode that fails earns -101 there and here."""

LINES = 41
"""Of a transcript: the walls felt last, and 20 turns before them."""

_MAP = """
#############
#.....#.....#
###.#####.###
###.#####.###
###.#####.###
###.......###
######.######
######.######
######.######
#############
""".split()

Cell = tuple[int, int]
Belief = tuple[Cell, ...]
"""Cells that are equally likely: where the same walls are felt, a move stops all or none, so that no two ever meet."""

GOAL: Cell = (8, 6)
FREE = frozenset((r, c) for r, row in enumerate(_MAP) for c, mark in enumerate(row) if mark == ".")
STARTS: tuple[Cell, ...] = tuple(sorted(FREE - {GOAL}))
_MOVES = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}


def step(cell: Cell, move: str) -> Cell:
    """Where a move leads: the cell itself where a wall is in the way."""
    to = (cell[0] + _MOVES[move][0], cell[1] + _MOVES[move][1])
    return to if to in FREE else cell


def walls(cell: Cell) -> str:
    """What is felt of a cell without seeing where it is."""
    return "Walls: " + (", ".join(move for move in _MOVES if step(cell, move) == cell) or "none") + "."


def fully_observed(seed: int = 0, number: int = 0) -> TextMDP:
    """The maze, each cell a state. `seed` and `number` only name the task: there is one maze."""

    def view(state: State) -> tuple[str, list[Move]]:
        cell: Cell = (state[0], state[1])
        page = f"You are in row {cell[0]}, column {cell[1]}. The goal is in row {GOAL[0]}, column {GOAL[1]}."
        return f"{page}\n{walls(cell)}", [(f"move {move}", _arrive(step(cell, move))) for move in _MOVES]

    start: list[tuple[float, State]] = [(1 / len(STARTS), cell) for cell in STARTS]
    return _explore(start, view, FULLY, seed, number)


def partially_observed(seed: int = 0, number: int = 0) -> TextMDP:
    """The maze, each belief a state. `seed` and `number` only name the task: there is one maze."""

    def view(belief: State) -> tuple[str, list[Move]]:
        moves: list[Move] = []
        for move in _MOVES:
            arrived = [step(cell, move) for cell in belief]
            outcomes: list[tuple[float, Outcome]] = [
                (chance, Go(after, -1.0, told)) for chance, after, told in _feel(arrived)
            ]
            if GOAL in arrived:
                outcomes.append((1 / len(arrived), End(0.0)))
            moves.append((f"move {move}", outcomes))
        return walls(belief[0]), moves

    start: list[tuple[float, State]] = [(chance, belief) for chance, belief, _ in _feel(STARTS)]
    return _explore(start, view, PARTIALLY, seed, number)


def _arrive(cell: Cell) -> Outcome:
    return End(0.0) if cell == GOAL else Go(cell, -1.0)


def _feel(cells: Sequence[Cell]) -> list[tuple[float, Belief, str]]:
    """Cells parted by the walls that are felt there: the chance, the belief and the text of each part.

    The goal is in no part, but counts in the chances.
    """
    parts: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell != GOAL:
            parts.setdefault(walls(cell), []).append(cell)
    return [(len(part) / len(cells), tuple(sorted(part)), told) for told, part in parts.items()]


def _explore(start: list[tuple[float, State]], view: View, benchmark: str, seed: int, number: int) -> TextMDP:
    task = TextMDP.explore(
        start, view, benchmark=benchmark, seed=seed, number=number, goal="Go to the goal of the maze in few moves.",
        limit=STEP_LIMIT, success=0.0, lines=LINES,
    )  # fmt: skip
    _, q = task.optimal(1.0)
    # near random, as the paper's data, which earns -83 an episode
    return replace(task, policies={"random": task.greedy(q, 1.0), "skilled-0.97": task.greedy(q, 0.97)})

"""A text web shop that is finite underneath: every value of every policy is known exactly.

A task is a deterministic Markov decision process of some hundred pages: home, search results over two pages,
product pages with a size to choose, the basket; a dead end that no click leads out of, purchases that cannot be
undone, and text that means nothing. The page text shows the state, so that a critic that reads goal and page can be
right everywhere (a product that lies on two shelves looks the same on both, and is worth the same). Words, wordings,
prices and positions are drawn from the site's seed; tasks of one site share its words, and a held-out task is a new
combination of them.

Values are computed in float64 by dynamic programming (`optimal`, `expectile`, `visitation`) and logs are
emitted in the ordinary `jsonl` format (`record`), with every possible action as a candidate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

State = tuple[Any, ...]
STEP_LIMIT = 15
WRONG_SIZE = 0.3
"""Reward for the right product in the wrong size, or in none."""

_NOUNS = (
    "mug kettle lamp scarf jacket chair vase clock blanket basket bottle wallet pillow towel backpack plate bench "
    "helmet umbrella candle notebook teapot ladder curtain"
).split()
_COLOURS = "red blue green black white yellow purple orange grey pink brown teal".split()
_MATERIALS = "steel cotton leather bamboo glass wool ceramic copper linen marble".split()
_SIZES = "small medium large mini giant standard".split()
_FILLER = (
    "Free returns within thirty days. ; Members earn points on every order. ; Rated 4.6 by our customers. ; "
    "Ships in two days. ; New arrivals every week. ; Ask our assistant anything. ; Gift wrapping available. ; "
    "Last chance offers end tonight. ; Trusted since 1998. ; Download our app."
).split(" ; ")
_GOALS = (
    "Buy a {colour} {material} {noun}, size {size}.",
    "I need one {material} {noun} in {colour}. Size: {size}.",
    "Order the {noun} that is {colour}, made of {material}, in {size}.",
    "Please get me a {size} {noun}, {colour}, {material}.",
)
_WORDING = {  # what a button is called on this site
    "buy": ("buy now", "order at once", "one click purchase"),
    "add": ("add to basket", "put in cart", "add to bag"),
    "checkout": ("checkout", "pay", "place order"),
    "remove": ("remove", "take out", "delete item"),
    "back": ("back to results", "return to list", "go back"),
    "home": ("home", "main page", "start"),
    "next": ("next page", "more results", "page 2"),
    "previous": ("previous page", "earlier results", "page 1"),
    "deals": ("daily deals", "offers", "bargains"),
    "lottery": ("prize draw", "win a voucher", "lucky wheel"),
    "wait": ("wait", "keep waiting", "stay in line"),
}


@dataclass(frozen=True)
class Product:
    """One thing for sale: title words and price; sizes are the task's."""

    colour: str
    material: str
    noun: str
    price: int

    @property
    def title(self) -> str:
        return f"{self.colour} {self.material} {self.noun}"


@dataclass(frozen=True)
class Site:
    """The words of one shop, drawn from its seed."""

    seed: int
    nouns: tuple[str, ...]
    colours: tuple[str, ...]
    materials: tuple[str, ...]
    sizes: tuple[str, ...]
    wording: dict[str, str]

    @classmethod
    def draw(cls, seed: int, nouns: int = 16, colours: int = 9, materials: int = 7) -> Site:
        rng = np.random.default_rng([seed, 0])

        def pick(words: Sequence[str], n: int) -> tuple[str, ...]:
            return tuple(str(w) for w in rng.permutation(words)[:n])

        wording = {button: str(rng.choice(names)) for button, names in _WORDING.items()}
        return cls(
            seed, pick(_NOUNS, nouns), pick(_COLOURS, colours), pick(_MATERIALS, materials), pick(_SIZES, 5), wording
        )


class Task:
    """One goal on one site, as a finite deterministic MDP.

    Attributes:
        states: list of all reachable states, `states[0]` is the start.
        actions: per state, the action texts.
        paths: per state, the actions of a shortest way to it.
        next: int array [S, A], the next state's index; -1 ends the episode (terminated), -2 is no action.
        reward: float64 array [S, A].
    """

    def __init__(self, site: Site, number: int) -> None:
        self.site, self.number = site, number
        self.task_id = f"shop{site.seed}/{number}"
        rng = np.random.default_rng([site.seed, 1, number])
        noun, other = (str(w) for w in rng.choice(site.nouns, 2, replace=False))
        colour, material = str(rng.choice(site.colours)), str(rng.choice(site.materials))
        self.sizes = tuple(str(s) for s in rng.permutation(site.sizes)[:3])
        self.size = str(rng.choice(self.sizes))
        self.nouns = (noun, other)

        def others(words: Sequence[str], word: str, n: int) -> list[str]:
            return [str(w) for w in rng.permutation([w for w in words if w != word])[:n]]

        c, m = others(site.colours, colour, 3), others(site.materials, material, 3)
        # near misses: one attribute right, so that no single word gives the target away
        looks = [(colour, material), (colour, m[0]), (colour, m[1]), (c[0], material), (c[1], material), (c[2], m[2])]
        shelf = [Product(a, b, noun, int(rng.integers(3, 99))) for a, b in looks]
        order = rng.permutation(len(shelf))
        self.target = int(np.flatnonzero(order == 0)[0])
        wrong = [(colour, material), (c[0], m[0]), (c[1], material)]  # the right look on the wrong kind of thing
        self.products = [shelf[i] for i in order] + [Product(a, b, other, int(rng.integers(3, 99))) for a, b in wrong]
        mixed = [(c[2], m[0]), (c[0], m[1])]
        self.products += [Product(a, b, str(rng.choice(site.nouns)), int(rng.integers(3, 99))) for a, b in mixed]
        self.goal = str(rng.choice(_GOALS)).format(colour=colour, material=material, noun=noun, size=self.size)
        self._shelves: dict[tuple[str, int], list[int]] = {
            (noun, 0): [0, 1, 2], (noun, 1): [3, 4, 5], (other, 0): [6, 7, 8], ("deals", 0): [9, 10, 6],
        }  # fmt: skip
        self._filler = rng
        self._enumerate()

    # -- the rules ---------------------------------------------------------------------------------------------

    def _moves(self, state: State) -> list[tuple[str, State | None, float]]:
        """(action, next state or None for the end, reward) for every action of a page."""
        w = self.site.wording
        home: State = ("home",)
        match state:
            case ("home",):
                return [
                    *((f"search[{n}]", ("results", n, 0), 0.0) for n in sorted(self.nouns)),
                    (f"click[{w['deals']}]", ("results", "deals", 0), 0.0),
                    (f"click[{w['lottery']}]", ("queue",), 0.0),
                ]
            case ("queue",):  # the dead end: nothing leads out, the step limit ends it
                return [(f"click[{w['wait']}]", state, 0.0), (f"click[{w['home']}]", state, 0.0)]
            case ("results", shelf, page):
                moves: list[tuple[str, State | None, float]] = [
                    (f"click[{self.products[i].title}]", ("product", i, None, state), 0.0)
                    for i in self._shelves[shelf, page]
                ]
                if (shelf, 1 - page) in self._shelves:
                    moves.append((f"click[{w['previous' if page else 'next']}]", ("results", shelf, 1 - page), 0.0))
                return [*moves, (f"click[{w['home']}]", home, 0.0)]
            case ("product", i, size, results):
                return [
                    *((f"click[{s}]", ("product", i, s, results), 0.0) for s in self.sizes if s != size),
                    (f"click[{w['add']}]", ("basket", i, size, results), 0.0),
                    (f"click[{w['buy']}]", None, self._worth(i, size)),
                    (f"click[{w['back']}]", results, 0.0),
                ]
            case ("basket", i, size, results):
                return [
                    (f"click[{w['checkout']}]", None, self._worth(i, size)),
                    (f"click[{w['remove']}]", ("product", i, size, results), 0.0),
                    (f"click[{w['home']}]", home, 0.0),
                ]
        raise AssertionError(state)

    def _worth(self, product: int, size: str | None) -> float:
        if product != self.target:
            return 0.0
        return 1.0 if size == self.size else WRONG_SIZE

    def _enumerate(self) -> None:
        self.states: list[State] = [("home",)]
        self.paths: list[list[str]] = [[]]
        index = {self.states[0]: 0}
        moves = []
        for state in self.states:  # grows while it is walked: breadth first
            moves.append(self._moves(state))
            for action, after, _ in moves[-1]:
                if after is not None and after not in index:
                    index[after] = len(self.states)
                    self.states.append(after)
                    self.paths.append([*self.paths[index[state]], action])
        width = max(map(len, moves))
        self.actions = [[action for action, _, _ in m] for m in moves]
        self.next = np.full((len(moves), width), -2)
        self.reward = np.zeros((len(moves), width))
        for s, m in enumerate(moves):
            for a, (_, after, reward) in enumerate(m):
                self.next[s, a] = -1 if after is None else index[after]
                self.reward[s, a] = reward
        # one filler line a page, fixed for the task: distractor text must not name the state
        self._lines = [str(self._filler.choice(_FILLER)) for _ in moves]

    @property
    def valid(self) -> np.ndarray:
        """bool [S, A]: which actions exist."""
        return self.next != -2

    def page(self, s: int) -> str:
        """The text of a page. It shows the whole state, but not the goal."""
        state, lines = self.states[s], []
        match state:
            case ("home",):
                lines = ["Welcome to the shop."]
            case ("queue",):
                lines = ["You are in line for the wheel. Thousands are before you."]
            case ("results", shelf, page):
                lines = [f"Results for {shelf}, page {page + 1}:"]
                lines += [f"{self.products[i].title} ${self.products[i].price}" for i in self._shelves[shelf, page]]
            case ("product", i, size, _):
                lines = [
                    f"Product: {self.products[i].title} ${self.products[i].price}",
                    f"Sizes: {', '.join(self.sizes)}",
                ]
                lines.append(f"Selected: {size or 'none'}")
            case ("basket", i, size, _):
                lines = [f"Basket: {self.products[i].title}", f"Selected: {size or 'none'}"]
        buttons = " ".join(a for a in self.actions[s] if not any(p.title in a for p in self.products))
        return "\n".join([*lines, self._lines[s], buttons])

    # -- exact values ------------------------------------------------------------------------------------------

    def backup(self, v: np.ndarray, gamma: float) -> np.ndarray:
        """Q [S, A] from V [S]: r + gamma * V(s'), NaN where there is no action."""
        q = self.reward + gamma * np.where(self.next >= 0, v[self.next], 0.0)
        return np.where(self.valid, q, np.nan)

    def optimal(self, gamma: float) -> tuple[np.ndarray, np.ndarray]:
        """V* [S] and Q* [S, A] by value iteration to a fixed point (float64)."""
        return self._fixed_point(lambda q: np.nanmax(q, axis=1), gamma)

    def evaluate(self, policy: np.ndarray, gamma: float) -> tuple[np.ndarray, np.ndarray]:
        """V [S] and Q [S, A] of a policy [S, A] without a step limit."""
        return self._fixed_point(lambda q: (policy * np.nan_to_num(q)).sum(axis=1), gamma)

    def expectile(self, policy: np.ndarray, gamma: float, tau: float) -> tuple[np.ndarray, np.ndarray]:
        """The fixed point of IQL (Kostrikov 2021, eq. 5-6): V(s) is the tau-expectile of Q(s, a), a ~ policy."""
        return self._fixed_point(lambda q: expectile(np.nan_to_num(q), policy, tau), gamma)

    def _fixed_point(self, reduce: Any, gamma: float) -> tuple[np.ndarray, np.ndarray]:
        v = np.zeros(len(self.states))
        while True:
            q = self.backup(v, gamma)
            new = reduce(q)
            if np.abs(new - v).max() < 1e-13:
                return new, q
            v = new

    def play(self, policy: np.ndarray, limit: int = STEP_LIMIT) -> float:
        """Expected undiscounted return of a policy [S, A] within the step limit, exactly."""
        at, total = np.zeros(len(self.states)), 0.0
        at[0] = 1.0
        for _ in range(limit):
            flow = at[:, None] * policy
            total += float((flow * self.reward).sum())
            at = self._move(flow)
        return total

    def visitation(self, policy: np.ndarray, limit: int = STEP_LIMIT) -> np.ndarray:
        """Expected visits of each state [S] in one episode within the step limit."""
        at = np.zeros(len(self.states))
        at[0] = 1.0
        visits = np.zeros_like(at)
        for _ in range(limit):
            visits += at
            at = self._move(at[:, None] * policy)
        return visits

    def _move(self, flow: np.ndarray) -> np.ndarray:
        at = np.zeros(len(self.states))
        stays = self.next >= 0
        np.add.at(at, self.next[stays], flow[stays])
        return at

    # -- policies ----------------------------------------------------------------------------------------------

    def greedy(self, q: np.ndarray, epsilon: float = 0.0) -> np.ndarray:
        """Epsilon-greedy policy [S, A] for Q [S, A]; ties go to the first action."""
        uniform = self.valid / self.valid.sum(axis=1, keepdims=True)
        best = np.zeros_like(uniform)
        best[np.arange(len(q)), np.nanargmax(np.where(self.valid, q, -np.inf), axis=1)] = 1.0
        return (1 - epsilon) * best + epsilon * uniform

    def behaviours(self, gamma: float = 0.95) -> dict[str, np.ndarray]:
        """The policies that the logs are a mixture of: two skilled, one careless, one random.

        The careless one takes another product of the target's kind for the target: it fails on purpose-like
        paths, so that a path's shape does not tell success.
        """
        _, q = self.optimal(gamma)
        decoy = Task(self.site, self.number)
        decoy.target = (self.target + 1) % 6
        decoy._enumerate()
        _, q_decoy = decoy.optimal(gamma)
        return {
            "skilled-0.1": self.greedy(q, 0.1),
            "skilled-0.4": self.greedy(q, 0.4),
            "careless-0.3": self.greedy(q_decoy, 0.3),
            "random": self.greedy(q, 1.0),
        }

    def mixture(self, gamma: float = 0.95) -> np.ndarray:
        """The behaviour policy [S, A] of equal parts of `behaviours`, as logs show it: weighted by visits."""
        flows = [self.visitation(p)[:, None] * p for p in self.behaviours(gamma).values()]
        flow = np.sum(flows, axis=0)
        uniform = self.valid / self.valid.sum(axis=1, keepdims=True)
        total = flow.sum(axis=1, keepdims=True)
        return np.where(total > 0, flow / np.where(total > 0, total, 1.0), uniform)


def expectile(x: np.ndarray, weight: np.ndarray, tau: float) -> np.ndarray:
    """The tau-expectile of each row of x [S, A] under weights [S, A], by bisection to 1e-14."""
    low, high = np.min(x, axis=1), np.max(x, axis=1)
    for _ in range(60):
        m = (low + high) / 2
        u = x - m[:, None]
        slope = (np.where(u < 0, 1 - tau, tau) * weight * u).sum(axis=1)
        low, high = np.where(slope > 0, m, low), np.where(slope > 0, high, m)
    return (low + high) / 2


def record(tasks: Sequence[Task], episodes: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Episodes in the `jsonl` format: `episodes` for each task, policies in turn, every action a candidate."""
    for task in tasks:
        behaviours = list(task.behaviours().items())
        for trial in range(episodes):
            name, policy = behaviours[trial % len(behaviours)]
            rng = np.random.default_rng([seed, task.site.seed, task.number, trial])
            yield _rollout(task, name, policy, trial, rng)


def _rollout(task: Task, name: str, policy: np.ndarray, trial: int, rng: np.random.Generator) -> dict[str, Any]:
    s, steps, reward = 0, [], 0.0
    while s >= 0 and len(steps) < STEP_LIMIT:
        a = int(rng.choice(policy.shape[1], p=policy[s]))
        reward = float(task.reward[s, a])
        steps.append({
            "observation": task.page(s),
            "action": task.actions[s][a],
            "candidates": [{"action": x, "source": "enumerated"} for x in task.actions[s]],
            "candidates_complete": True,
            "behavior_logprob": float(np.log(policy[s, a])),
            "reward": reward,
        })  # fmt: skip
        s = int(task.next[s, a])
    done = s < 0
    episode = {
        "episode_id": f"{task.task_id}/{trial}", "benchmark": "shop", "task_id": task.task_id,
        "site": f"shop{task.site.seed}", "goal": task.goal, "trial": trial,
        "policy_id": name, "policy_kind": "scripted",
        "outcome_reward": reward, "success": reward == 1.0, "terminated": done, "truncated": not done,
        "end_reason": "env_done" if done else "step_limit", "steps": steps,
    }  # fmt: skip
    if not done:
        episode["final_observation"] = task.page(s)
    return episode

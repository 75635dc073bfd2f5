"""The policies that `collect` knows by name."""

from __future__ import annotations

from collections.abc import Sequence

from offline_lm.envs import scripted
from offline_lm.envs.policies import Array, Chooser, Policy, State, greedy, uniform
from offline_lm.errors import UserError

NAMES = ("random", "scripted", "run:RUN")


def named(name: str, *, epsilon: float, temperature: float, store: str, env: str) -> Policy:
    """``random``; ``scripted`` (MiniWoB's rules); ``run:RUN``, the action of the greatest Q of a run of `store`.

    Args:
        epsilon: chance of any action of the page instead.
        temperature: of a softmax over Q; 0: the greatest.
        env: what is played.

    Raises:
        UserError: an unknown name, a number out of range, rules for another environment, a run without Q.
    """
    if not 0 <= epsilon <= 1:
        raise UserError(f"epsilon={epsilon}: a chance from 0 to 1 is wanted")
    if temperature < 0:
        raise UserError(f"temperature={temperature}: a number from 0 is wanted")
    if name == "random":
        return Chooser("random", uniform)
    if name == "scripted":
        if env != "miniwob":
            raise UserError(f"policy=scripted: its rules are for env=miniwob, not env={env}; policy=random is for all")
        return Chooser("scripted", scripted.probabilities, epsilon)
    if name.startswith("run:"):
        return _ranked(name.removeprefix("run:"), epsilon, temperature, store)
    raise UserError(f"policy={name}: there are {', '.join(NAMES)}")


def _ranked(run: str, epsilon: float, temperature: float, store: str) -> Policy:
    """The page's actions, ranked by a run's Q; all the pages that wait are scored in one pass."""
    from offline_lm.models.critic import Critic, find_run

    folder = find_run(run, store)
    critic = Critic.from_pretrained(folder)
    if not critic.config["has_q"]:
        raise UserError(f"policy=run:{run}: that run has V alone; one with Q is wanted (algo=q_mc, iql_lm ...)")

    def probabilities(states: Sequence[State]) -> list[tuple[Array, Sequence[float] | None]]:
        asked = [
            {"goal": s.goal, "observation": s.observation, "url": s.url, "history": s.history, "candidates": s.actions}
            for s in states
        ]
        q = [score.q or [] for score in critic.score(asked)]
        return [(greedy(each, temperature), each) for each in q]

    name = f"q-{folder.name}" + (f"-t{temperature:g}" if temperature else "")
    return Chooser(name, probabilities, epsilon, kind="search")

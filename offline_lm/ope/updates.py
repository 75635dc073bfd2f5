"""What is wrong with the updates of an actor, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

SILENT = 0.95
"""Share of responses without an advantage, from which on nothing is learnt."""
CLIPPED = 0.5
LEAST_ESS = 0.05
KL = 1.0
"""Nats a token, from the policy that ratios are to."""


class Alarm(NamedTuple):
    """What is wrong, its number, and a sentence that says what to do."""

    name: str
    value: float
    sentence: str


def alarms(
    before: Mapping[str, float], after: Mapping[str, float], last: Mapping[str, float], silent: float
) -> list[Alarm]:
    """What the numbers of an actor's training give away.

    Args:
        before, after: mean log-probabilities of logged responses, `logprob_success` among them.
        last: numbers of the last update (`losses.policy.update_health`), where its loss compares policies.
        silent: share of the responses whose advantage is 0.
    """
    found = []
    if silent > SILENT:
        text = (
            f"{silent:.0%} of the responses have advantage 0: most groups hold one run, or runs that came to the same"
        )
        found.append(Alarm("silent_groups", silent, f"{text}; an algorithm with a critic would learn from them"))
    if last.get("clip_fraction", 0.0) > CLIPPED:
        text = f"{last['clip_fraction']:.0%} of the tokens are clipped: the policy has left the one it is compared with"
        found.append(Alarm("clipped", last["clip_fraction"], f"{text}; lower actor.steps or actor.lr"))
    if last.get("ess", 1.0) < LEAST_ESS:
        text = f"importance weights are worth {last['ess']:.1%} of the responses: a few of them decide the update"
        found.append(
            Alarm("few_effective_samples", last["ess"], f"{text}; lower actor.lr, or compare with a nearer policy")
        )
    if last.get("approx_kl", 0.0) > KL:
        text = f"the policy has moved {last['approx_kl']:.2f} nats a token from the one it is compared with"
        found.append(Alarm("far_from_behaviour", last["approx_kl"], f"{text}; raise algo.kl or lower actor.lr"))
    fell = before.get("logprob_success", 0.0) - after.get("logprob_success", 0.0)
    if fell > 10.0:
        text = f"responses of successful runs have become e^{fell:.0f} times less likely than under the starting policy"
        found.append(Alarm("forgot_successes", fell, f"{text}: the update pushes away what worked"))
    return found

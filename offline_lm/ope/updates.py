"""What the updates of an actor did to the logged responses, and what is wrong with them, in words."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from offline_lm.ope.alarms import Alarm

Array = np.ndarray

SILENT = 0.95
"""Share of responses without an advantage, from which on nothing is learnt."""
CLIPPED = 0.5
LEAST_ESS = 0.05
KL = 1.0
"""Nats a token, from the policy that ratios are to."""
FORGOT = 10.0
"""Nats a response of a successful run."""


def by_outcome(logprobs: Array, success: Array) -> dict[str, float]:
    """Mean log-probability of logged responses: of all, of those of successful runs, and of failed ones.

    Args:
        logprobs: float [R], of each response, the sum over its tokens.
        success: float [R], of its run: 1, 0, or between or NaN, which is of neither kind.
    """
    said = {
        "logprob_all": logprobs, "logprob_success": logprobs[success == 1], "logprob_failure": logprobs[success == 0],
    }  # fmt: skip
    return {name: float(x.mean()) if len(x) else float("nan") for name, x in said.items()}


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
        mend = "an algorithm with a critic would learn from them"
        found.append(Alarm("silent_groups", f"{text}; {mend}", silent, SILENT))
    if (clipped := last.get("clip_fraction", 0.0)) > CLIPPED:
        text = f"{clipped:.0%} of the tokens are clipped: the policy has left the one it is compared with"
        found.append(Alarm("clipped", f"{text}; lower actor.steps or actor.lr", clipped, CLIPPED))
    if (ess := last.get("ess", 1.0)) < LEAST_ESS:
        text = f"importance weights are worth {ess:.1%} of the responses: a few of them decide the update"
        mend = "lower actor.lr, or compare with a nearer policy"
        found.append(Alarm("few_effective_samples", f"{text}; {mend}", ess, LEAST_ESS))
    if (moved := last.get("approx_kl", 0.0)) > KL:
        text = f"the policy has moved {moved:.2f} nats a token from the one it is compared with"
        found.append(Alarm("far_from_behaviour", f"{text}; raise algo.kl or lower actor.lr", moved, KL))
    fell = before.get("logprob_success", 0.0) - after.get("logprob_success", 0.0)
    if fell > FORGOT:
        text = f"responses of successful runs have become e^{fell:.0f} times less likely than under the starting policy"
        found.append(Alarm("forgot_successes", f"{text}: the update pushes away what worked", fell, FORGOT))
    return found

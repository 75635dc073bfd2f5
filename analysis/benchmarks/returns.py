"""Returns G_t and advantages (GAE) over a million steps of ragged episodes, beside a Python loop.

    python analysis/benchmarks/returns.py [json=true] [steps=1000000] [repeats=5] [dtype=float32] [loop_steps=200000]

Millions of steps a second on one thread; episodes of 1 to 59 steps, two in three terminated.

    loop       a Python loop over lists from the end, as most code has it; on `loop_steps` of the steps
    numpy      a loop over columns of episodes that were padded beforehand: the padding is not counted
    lfilter    scipy's linear filter, an episode at a time (G_t alone; no termination within an episode)
    ours       `offline_lm.losses.returns.discounted_returns` and `gae`
    copy       the floor that no pass over memory goes below: reading both inputs once and writing the result

`ratio` is ours / loop for G_t. All rows agree to 1e-4 before anything is measured.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import _measure
import numpy as np
import torch
from scipy.signal import lfilter

from offline_lm.losses.returns import discounted_returns, gae, next_values

GAMMA, LAMBDA, GOAL = 0.95, 0.9, 10


def loop_returns(reward: list[float], continues: list[float], last: list[bool]) -> list[float]:
    out, following = [0.0] * len(reward), 0.0
    for t in range(len(reward) - 1, -1, -1):
        if last[t]:
            following = 0.0
        following = reward[t] + GAMMA * continues[t] * following
        out[t] = following
    return out


def loop_gae(
    reward: list[float], continues: list[float], last: list[bool], value: list[float], after: list[float]
) -> list[float]:
    out, following = [0.0] * len(reward), 0.0
    for t in range(len(reward) - 1, -1, -1):
        if last[t]:
            following = 0.0
        following = reward[t] + GAMMA * continues[t] * after[t] - value[t] + GAMMA * LAMBDA * continues[t] * following
        out[t] = following
    return out


def columns(reward: np.ndarray, continues: np.ndarray) -> np.ndarray:
    """G_t of episodes padded to one length, [e, T], a column at a time."""
    out, following = np.empty_like(reward), np.zeros(len(reward), reward.dtype)
    for t in range(reward.shape[1] - 1, -1, -1):
        following = reward[:, t] + GAMMA * continues[:, t] * following
        out[:, t] = following
    return out


def padded(x: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.diff(offsets)
    inside = np.arange(lengths.max()) < lengths[:, None]
    out = np.zeros(inside.shape, x.dtype)
    out[inside] = x
    return out, inside


def filtered(reward: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    out = np.empty_like(reward)
    for first, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        out[first:stop] = lfilter([1.0], [1.0, -GAMMA], reward[first:stop][::-1])[::-1]
    return out


def measure(given: dict[str, str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, int(given["steps"]) // 30)
    offsets = np.r_[0, np.cumsum(lengths)]
    n = int(offsets[-1])
    last = np.zeros(n, bool)
    last[offsets[1:] - 1] = True
    dtype = np.dtype(given["dtype"])
    reward, value = rng.standard_normal(n).astype(dtype), rng.standard_normal(n).astype(dtype)
    continues = (~(last & (rng.random(n) < 2 / 3))).astype(dtype)
    some = int(offsets[np.searchsorted(offsets, min(int(given["loop_steps"]), n))])
    tensors = [torch.from_numpy(x) for x in (reward, continues, value)]
    ends = torch.from_numpy(offsets)
    after = next_values(tensors[2], ends)
    lists = [x[:some].tolist() for x in (reward, continues, last, value, after.numpy())]
    wide_reward, inside = padded(reward, offsets)
    wide_continues, _ = padded(continues, offsets)
    out = torch.empty(n, dtype=tensors[0].dtype)

    returns: dict[str, Callable[[], Any]] = {
        "loop": lambda: loop_returns(*lists[:3]),
        "numpy": lambda: columns(wide_reward, wide_continues),
        "lfilter": lambda: filtered(reward, offsets),
        "ours": lambda: discounted_returns(tensors[0], tensors[1], ends, gamma=GAMMA),
        "copy": lambda: torch.add(tensors[0], tensors[1], out=out),
    }
    advantages: dict[str, Callable[[], Any]] = {
        "loop": lambda: loop_gae(*lists),
        "ours": lambda: gae(tensors[0], tensors[1], tensors[2], after, ends, gamma=GAMMA, lam=LAMBDA),
    }
    expected = returns["ours"]().numpy()
    for name, mine in (("loop", expected[:some]), ("numpy", expected), ("lfilter", expected)):
        found = np.asarray(returns[name]())
        np.testing.assert_allclose(found[inside] if name == "numpy" else found, mine, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(advantages["loop"](), advantages["ours"]().numpy()[:some], atol=1e-4)

    def speed(name: str, work: Callable[[], Any]) -> Callable[[], float]:
        steps = some if name == "loop" else n

        def once() -> float:
            started = time.perf_counter()
            work()
            return steps / (time.perf_counter() - started) / 1e6

        return once

    rows = []
    for what, works in (("G_t", returns), ("GAE", advantages)):
        seen = _measure.repeat({name: speed(name, work) for name, work in works.items()}, int(given["repeats"]))
        medians = _measure.medians(seen)
        rows.append(
            {
                "of": what,
                **{name: medians.get(name) for name in returns},
                "ratio": medians["ours"] / medians["loop"],
            }
        )
    first = rows[0]
    result = {"ours": first["ours"], "peer": first["loop"], "ratio": first["ratio"], "goal": GOAL}
    versions = _measure.versions("torch", "numpy", "scipy", steps=n, dtype=given["dtype"], repeats=given["repeats"])
    return {**result, "unit": "M steps/s", "versions": versions}, rows


def main(argv: list[str]) -> None:
    given = _measure.arguments(argv, steps="1000000", repeats="5", dtype="float32", loop_steps="200000")
    result, rows = measure(given)
    _measure.report(result, rows, given, __file__)


if __name__ == "__main__":
    main(sys.argv[1:])

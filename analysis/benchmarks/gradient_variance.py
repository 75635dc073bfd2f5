"""Variance and bias of the policy gradient with baselines none, mean, V, TD(0) and GAE, on the same batches.

    python analysis/benchmarks/gradient_variance.py [json=true] [plot=variance.svg] [seeds=0,1,2] [horizons=1,5,20]
        [tasks=2] [episodes=8] [batches=1000] [lambda=0.95] [gamma=0.95] [sketch=2048]

The policy is a language model that has cloned the behaviour mu of the shop's logs to the full:

    pi(a | s) ~ mu(a | s) exp(l(s, a) - l_0(s, a))

with l the log-likelihood that a Llama of 2 layers of 128 gives to the text of a behind the page, and l_0 what it gives
at the start, where all is measured. So it acts as mu does, its values under the step limit are known
(`offline_lm.ope.credit`), and from them the expected gradient, a sum over all pages and turns; the gradients are those
of a language model. It draws the batches, each of `episodes` episodes of every one of `tasks` tasks. A batch's gradient
is the mean over its episodes of

    sum_t A_t grad log pi(a_t | s_t)

and A_t is one of

    none   G_t, the discounted return from here on
    mean   G_t less its mean over the batch
    V      G_t - V(s_t)
    TD(0)  r_t + gamma V(s_t+1) - V(s_t)
    GAE    of `lambda` (Schulman et al. 2016)

with V exact, or fitted: a table for each batch, the fixed point of TD(0) on its own steps.

    variance  mean squared distance of a batch's gradient to the mean one, over that of `none`
    noise     its root, over the length of the expected gradient: at 1 a step is as much noise as signal
    bias      distance of the mean gradient to that with true advantages on the same batches, over the same length. It
              is estimated without counting noise as bias: where there is none it lies about 0, also below

Gradients of all weights are folded into `sketch` numbers: each weight adds to one of them, drawn, with a drawn sign
(count sketch, Charikar et al. 2002). That keeps inner products, and so variances, without bias.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import _measure
import numpy as np
import torch

from offline_lm._evaluate_credit import behaviour
from offline_lm.batches.tokens import tokenize
from offline_lm.envs import shop
from offline_lm.envs.exact import TextMDP
from offline_lm.models import acting, backbone
from offline_lm.models.acting import Chosen
from offline_lm.models.critic import state_row
from offline_lm.ope import credit
from offline_lm.ope.credit import Estimator, Logs, Tasks

Array = np.ndarray
COLOURS = {"": "#999999", "exact": "#000000", "fitted": "#0072b2"}
WIDTH, BAR, LABEL = 170, 16, 100  # of a panel, a bar and its label, in pixels


def scores_of(mdps: list[TextMDP], policy: Array, sketch: int, seed: int) -> Array:
    """grad log pi(a | s), [S, A, sketch], where pi is `policy` [S, A]: grad l less its mean under the policy."""
    pages = [(mdp, page, own) for mdp in mdps for page, own in zip(mdp.pages, mdp.actions, strict=True)]
    rows = [
        {**state_row({"goal": mdp.goal, "observation": page, "candidates": own}, n, None), "episode_id": str(n)}
        for n, (mdp, page, own) in enumerate(pages)
    ]
    texts = [text for mdp, page, own in pages for text in (mdp.goal, page, *own)]
    model, tokenizer = backbone.tiny(texts, layers=2, seed=seed)
    tokens = tokenize(rows, tokenizer)
    parameters = list(model.parameters())
    n_weights = sum(p.numel() for p in parameters)
    generator = torch.Generator().manual_seed(seed)
    place = torch.randint(sketch, (n_weights,), generator=generator)
    sign = torch.randint(2, (n_weights,), generator=generator) * 2.0 - 1.0
    out = np.zeros((*policy.shape, sketch))
    for s in range(len(pages)):
        for a, branch in enumerate(range(tokens.branch_ptr[s], tokens.branch_ptr[s + 1])):
            logprobs, _ = acting.response_logprobs(model, tokens, Chosen(np.array([s]), [[branch]]))
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(logprobs.sum(), parameters)])
            out[s, a] = torch.zeros(sketch).index_add_(0, place, sign * gradient).numpy()
    return out - (policy[..., None] * out).sum(axis=1, keepdims=True)


# -- gradients of batches ---------------------------------------------------------------------------------------------


def gradients(scores: Array, logs: Logs, advantages: Array) -> Array:
    """[R, m]: for each batch (resample) the mean over its episodes of sum_t A_t grad log pi(a_t | s_t).

    Args:
        scores: [S, A, m], grad log pi(a | s).
        advantages: [n], of the logged steps.
    """
    n_batches, n_pairs = int(logs.resample[-1]) + 1, scores.shape[0] * scores.shape[1]
    pair = logs.resample * n_pairs + logs.state * scores.shape[1] + logs.action
    weight = np.bincount(pair, advantages, n_batches * n_pairs).reshape(n_batches, n_pairs)
    return weight @ scores.reshape(n_pairs, -1) * (n_batches / (len(logs.offsets) - 1))


def expected(scores: Array, tasks: Tasks, gamma: float) -> Array:
    """[m]: the expectation of `gradients` with true advantages, each task as often as any other."""
    v = tasks.values(gamma)
    at = np.bincount(tasks.start, minlength=len(tasks.next)) / len(tasks.start)
    weight = np.zeros_like(tasks.reward)
    for t in range(tasks.limit):
        flow = at[:, None] * tasks.policy
        onward = tasks.next >= 0
        weight += flow * (tasks.reward + gamma * np.where(onward, v[t + 1][tasks.next], 0.0) - v[t][:, None])
        at = np.bincount(tasks.next[onward], flow[onward], len(at))
    return np.einsum("sa,sam->m", weight, scores)


def spread(found: Array, true: Array, length: float) -> dict[str, float]:
    """Variance of the gradients `found` [R, m], and the square of their bias to `true` [R, m] on the same batches.

    Args:
        length: of the expected gradient.

    Returns:
        variance, in squared units of a gradient; bias_squared, relative to `length` squared, from products of
        differences in different batches: the square of a mean would count its noise.
    """
    n, apart = len(found), found - true
    across = (apart.sum(axis=0) ** 2).sum() - (apart**2).sum()
    return {
        "variance": float(((found - found.mean(axis=0)) ** 2).sum() / (n - 1)),
        "bias_squared": float(across / (n * (n - 1)) / length**2),
    }


# -- measurement ------------------------------------------------------------------------------------------------------


def measure_one(given: dict[str, str], horizon: int, seed: int) -> list[dict[str, Any]]:
    """A row for each baseline."""
    gamma, lam, episodes = float(given["gamma"]), float(given["lambda"]), int(given["episodes"])
    words = shop.Site.draw(seed)
    mdps = [shop.Task(words, number, max(horizon, shop.HORIZON)).mdp for number in range(int(given["tasks"]))]
    if horizon == 1:
        mdps = [shop.single_turn(mdp) for mdp in mdps]
    tasks = Tasks.stack(mdps, [behaviour(mdp, [seed, number]) for number, mdp in enumerate(mdps)])
    scores = scores_of(mdps, tasks.policy, int(given["sketch"]), seed)
    logs = credit.sample(tasks, episodes, int(given["batches"]), seed)
    true = gradients(scores, logs, credit.true_advantages(logs, tasks, gamma=gamma))
    length = float(np.linalg.norm(expected(scores, tasks, gamma)))
    wanted = {Estimator("reinforce"): ("none", ""), Estimator("reinforce_mean"): ("mean", "")}
    for critic, fitted in (("exact", "exact"), ("td_table", "fitted")):
        wanted[Estimator("mc", critic)] = "V", fitted
        wanted[Estimator("td", critic, 0.0)] = "TD(0)", fitted
        wanted[Estimator("gae", critic, lam)] = f"GAE({lam:g})", fitted
    found = {}
    for estimator, advantages in credit.estimates(logs, tasks, gamma=gamma, lambdas=[lam], tau=0.5, group=episodes):
        if estimator in wanted:
            found[wanted[estimator]] = spread(gradients(scores, logs, advantages), true, length)
        if len(found) == len(wanted):
            break  # what comes behind is never computed
    outcome, _ = credit.outcomes(logs, episodes)
    about = {
        "seed": seed, "horizon": horizon, "success": float((outcome == 1).double().mean()),
        "steps": float(np.diff(logs.offsets).mean()),
    }  # fmt: skip
    none = found["none", ""]["variance"]
    return [
        {
            **about, "baseline": baseline, "critic": critic, "variance": each["variance"] / none,
            "noise": each["variance"] ** 0.5 / length, "bias_squared": each["bias_squared"],
        }
        for (baseline, critic), each in found.items()
    ]  # fmt: skip


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over seeds: `variances` of each, `variance_sd` their deviation; `bias` is the root of the mean square."""
    out = []
    for key in dict.fromkeys((row["horizon"], row["baseline"], row["critic"]) for row in rows):
        own = [row for row in rows if (row["horizon"], row["baseline"], row["critic"]) == key]
        square = statistics.fmean(row["bias_squared"] for row in own)
        variances = [row["variance"] for row in own]
        out.append({
            **dict(zip(("horizon", "baseline", "critic"), key, strict=True)),
            **{name: statistics.fmean(row[name] for row in own) for name in ("success", "steps", "variance", "noise")},
            "variances": variances, "variance_sd": statistics.pstdev(variances),
            "bias": float(np.sign(square) * abs(square) ** 0.5),
        })  # fmt: skip
    return out


# -- the report -------------------------------------------------------------------------------------------------------


def show(rows: list[dict[str, Any]]) -> None:
    """A line for each baseline, three columns for each horizon."""
    horizons = list(dict.fromkeys(row["horizon"] for row in rows))
    about = {row["horizon"]: f"{row['horizon']} ({row['steps']:.0f} steps, {row['success']:.0%})" for row in rows}
    print(f"{'horizon (success)':16}", *(f"{about[h]:^27}" for h in horizons), sep=" | ")
    print(f"{'':16}", *[f"{'variance':>13}{'noise':>7}{'bias':>7}"] * len(horizons), sep=" | ")
    cells = {(label_of(row), row["horizon"]): row for row in rows}
    for label in dict.fromkeys(label for label, _ in cells):
        own = [cells[label, h] for h in horizons]
        print(
            f"{label:16}",
            *(f"{r['variance']:7.3f} ±{r['variance_sd']:.2f}{r['noise']:7.2f}{r['bias']:7.2f}" for r in own), sep=" | ",
        )  # fmt: skip


def label_of(row: dict[str, Any]) -> str:
    return f"{row['baseline']} {row['critic']}".strip()


def picture(rows: list[dict[str, Any]]) -> str:
    """SVG: bars of the variance, and below them of the bias; a panel for each horizon."""
    horizons = list(dict.fromkeys(row["horizon"] for row in rows))
    labels = list(dict.fromkeys(label_of(row) for row in rows))
    out, height = [], (len(labels) + 3) * BAR
    titles = {"variance": "variance, over that without a baseline", "bias": "bias, over the expected gradient's length"}
    for i, (key, title) in enumerate(titles.items()):
        top, most = i * height + BAR, max(row[key] for row in rows)
        out.append(_text(LABEL, top, title))
        out += [_text(4, top + (k + 2.7) * BAR, label) for k, label in enumerate(labels)]
        for j, horizon in enumerate(horizons):
            left = LABEL + j * WIDTH
            out.append(_text(left, top + 1.4 * BAR, f"horizon {horizon}"))
            for row in rows:
                if row["horizon"] == horizon:
                    y, x = top + (labels.index(label_of(row)) + 1.8) * BAR, max(row[key], 0.0)
                    width = (WIDTH - 45) * x / (most or 1.0)
                    colour = COLOURS[row["critic"]]
                    out.append(f'<rect x="{left}" y="{y:.1f}" width="{width:.1f}" height="{BAR - 3}" fill="{colour}"/>')
                    out.append(_text(left + width + 4, y + BAR - 6, f"{x:.2f}"))
    size = f'width="{LABEL + len(horizons) * WIDTH}" height="{2 * height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *out, "</svg>"]) + "\n"


def _text(x: float, y: float, words: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}">{words}</text>'


def main(argv: list[str]) -> None:
    given = _measure.arguments(
        argv, plot="", seeds="0,1,2", horizons="1,5,20", tasks="2", episodes="8", batches="1000", gamma="0.95",
        sketch="2048", **{"lambda": "0.95"},
    )  # fmt: skip
    torch.set_num_threads(1)
    seeds, horizons = ([int(x) for x in given[key].split(",")] for key in ("seeds", "horizons"))
    rows = means([row for horizon in horizons for seed in seeds for row in measure_one(given, horizon, seed)])
    if given["plot"]:
        Path(given["plot"]).write_text(picture(rows), encoding="utf-8")
    if given["json"] == "true":
        print(json.dumps({"rows": rows, "versions": _measure.versions("torch", "numpy", "scipy", **given)}))
    else:
        show(rows)


if __name__ == "__main__":
    main(sys.argv[1:])

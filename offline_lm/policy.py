"""Policies to act with: a trained actor, read back from its run.

>>> policy = Policy.from_pretrained("STORE/runs/RUN_ID")
>>> policy.act({"goal": "Buy a red mug", "observation": "..."}, candidates=["click[4]", "back"])
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offline_lm.batches.tokens import tokenize
from offline_lm.errors import UserError
from offline_lm.models import acting, backbone, token_heads
from offline_lm.models.acting import Chosen
from offline_lm.models.critic import find_run_folder, state_row
from offline_lm.models.devices import row_tokens
from offline_lm.models.token_heads import TokenHeads

Array = np.ndarray
FILE = "policy.json"


@dataclass(frozen=True)
class Choice:
    """What a policy does: the action, its log-probability, and the log-probabilities of all that it chose from."""

    action: str
    logprob: float
    actions: list[str]
    logprobs: list[float]


class Policy:
    """A language model that acts: pi(response | page), restricted to candidates where they are given.

    With `heads` (algo=ilql) its tokens are perturbed by their advantages (`losses.ilql.perturbed_logprobs`).
    """

    def __init__(self, model: Any, tokenizer: Any, config: dict[str, Any], heads: TokenHeads | None = None) -> None:
        self.model, self.tokenizer, self.config, self.heads = model.eval(), tokenizer, config, heads

    @classmethod
    def from_pretrained(cls, run: str | Path) -> Policy:
        """Open the folder of a run that trained an actor.

        Raises:
            UserError: no actor there.
        """
        folder = Path(run)
        if not (folder / FILE).is_file():
            raise UserError(
                f"{folder} holds no {FILE}: give the folder of a run that trained an actor, such as algo=bc"
            )
        config = json.loads((folder / FILE).read_text())
        model, tokenizer = backbone.load(str(folder / "actor"), config["dtype"])
        return cls(model, tokenizer, config, token_heads.load(folder, model) if "ilql" in config else None)

    def logprobs(self, states: Iterable[dict[str, Any]], *, token_budget: int | None = None) -> list[Array]:
        """log pi(a | s) of every candidate of each state, the sum over its tokens, end-of-turn token included.

        Args:
            states: as `Critic.score` takes them, each with `candidates`.

        Raises:
            UserError: a state without candidates, or too long to read.
        """
        shown = self.config["history"] if self.config["context"] == "actions" else None
        rows = [state_row(state, number, shown) for number, state in enumerate(states)]
        for number, row in enumerate(rows):
            if not row["candidates"]:
                raise UserError(f"input record {number}: it needs `candidates` to choose from")
        settings = {key: self.config[key] for key in ("max_tokens", "history", "context")}
        tokens = tokenize([{**row, "episode_id": str(n)} for n, row in enumerate(rows)], self.tokenizer, **settings)
        if not tokens.usable.all():
            number = int(np.flatnonzero(~tokens.usable)[0])
            raise UserError(
                f"input record {number}: goal and last past action exceed {self.config['max_tokens']} tokens"
            )
        # states that begin alike stand together, so that what they share is encoded once
        order = np.array(sorted(range(len(tokens)), key=lambda n: tokens.prompt(n).tobytes()), np.int64)
        responses = [list(range(int(tokens.branch_ptr[n]), int(tokens.branch_ptr[n + 1]))) for n in order]
        out = np.zeros(len(tokens.response_ptr) - 1)
        budget = token_budget or row_tokens(next(self.model.parameters()).device)
        with torch.no_grad():
            for part in Chosen(order, responses).rows(tokens, budget):
                if self.heads is None:
                    found, _ = acting.response_logprobs(self.model, tokens, part)
                else:
                    beta = self.config["ilql"]["beta"]
                    found = token_heads.response_logprobs(self.model, self.heads, tokens, part, beta=beta)
                first = np.r_[0, np.cumsum(acting.lengths(tokens, part.branches))[:-1]].astype(np.int64)
                out[part.branches] = np.add.reduceat(found.double().cpu().numpy(), first)
        return [out[tokens.candidate_branch[a:b]] for a, b in pairwise(tokens.candidate_ptr.tolist())]

    def act(
        self, state: dict[str, Any], candidates: Sequence[str] | None = None, *, temperature: float = 1.0, seed: int = 0
    ) -> Choice:
        """One action of `candidates` (or of the state's own), drawn from pi among them; the likeliest at temperature 0."""
        asked = state if candidates is None else {**state, "candidates": list(candidates)}
        (logprobs,) = self.logprobs([asked])
        actions = [c if isinstance(c, str) else c["action"] for c in asked["candidates"]]
        among = (
            log_softmax(logprobs / temperature) if temperature else np.where(logprobs == logprobs.max(), 0.0, -np.inf)
        )
        chosen = int(np.random.default_rng(seed).choice(len(actions), p=np.exp(among) / np.exp(among).sum()))
        return Choice(actions[chosen], float(among[chosen]), actions, among.tolist())


def log_softmax(x: Array) -> Array:
    shifted = x - x.max()
    return shifted - np.log(np.exp(shifted).sum())


def save_policy(folder: Path, model: Any, tokenizer: Any, config: dict[str, Any]) -> None:
    """Write an actor and how it reads pages."""
    backbone.save(model, tokenizer, folder / "actor")
    (folder / FILE).write_text(json.dumps(config, indent=2))


def start_of(path: str, store_url: str) -> str:
    """The folder or hub name that `actor.path` means: a model, or `run:RUN`, the actor of that run."""
    if not path.startswith("run:"):
        return path
    return str(find_run_folder(path.removeprefix("run:"), store_url, FILE) / "actor")

"""Policies to act with: a trained actor, or a critic that chooses among candidates, behind one `act`.

>>> policy = Policy.from_pretrained("STORE/runs/RUN_ID")
>>> policy.act({"goal": "Buy a red mug", "observation": "..."}, candidates=["click[4]", "back"])
>>> best_of_8 = Reranker(Critic.from_pretrained("STORE/runs/CRITIC"), policy)
>>> best_of_8.act({"goal": "Buy a red mug", "observation": "..."}, n=8)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from offline_lm.batches.render import frame
from offline_lm.batches.tokens import Tokens, encode, tokenize
from offline_lm.errors import UserError
from offline_lm.models import acting, backbone, token_heads
from offline_lm.models.acting import Chosen
from offline_lm.models.critic import Critic, find_run_folder, state_row
from offline_lm.models.devices import row_tokens
from offline_lm.models.token_heads import TokenHeads

Array = np.ndarray
FILE = "policy.json"


@dataclass(frozen=True)
class Choice:
    """What a policy does.

    Attributes:
        action: the response chosen, a text.
        logprob: its log-probability among `actions`; of a single sample, under the model.
        actions: all that it chose from.
        logprobs: of each of them.
        values: Q of each, where a critic was asked.
    """

    action: str
    logprob: float
    actions: list[str]
    logprobs: list[float]
    values: list[float] | None = None


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
        asked = list(states)
        for number, state in enumerate(asked):
            if not state.get("candidates"):
                raise UserError(f"input record {number}: it needs `candidates` to choose from")
        tokens = self._tokens(asked)
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

    def _tokens(self, states: list[dict[str, Any]]) -> Tokens:
        shown = self.config["history"] if self.config["context"] == "actions" else None
        rows = [{**state_row(state, n, shown), "episode_id": str(n)} for n, state in enumerate(states)]
        tokens = tokenize(
            rows, self.tokenizer, **{key: self.config[key] for key in ("max_tokens", "history", "context")}
        )
        if not tokens.usable.all():
            number, limit = int(np.flatnonzero(~tokens.usable)[0]), self.config["max_tokens"]
            raise UserError(f"input record {number}: goal and last past action exceed the policy's max_tokens={limit}")
        return tokens

    def sample(
        self, state: dict[str, Any], n: int, *, temperature: float = 1.0, max_tokens: int = 256, seed: int = 0
    ) -> list[tuple[str, float]]:
        """`n` responses drawn from pi, and their log-probabilities at this temperature, end-of-turn token included.

        A response that does not end within `max_tokens` is cut there.

        Raises:
            UserError: a state too long to read.
        """
        drawn = self.sample_ids(state, n, temperature=temperature, max_tokens=max_tokens, seed=seed)
        end = self._end
        kept = [(ids[: -len(end)] if ids[-len(end) :] == end else ids, logprob) for ids, logprob in drawn]
        return [(self.tokenizer.decode(ids), logprob) for ids, logprob in kept]

    @property
    def _end(self) -> list[int]:
        """What closes a response, as it was trained on."""
        return encode(self.tokenizer, [end := frame(self.tokenizer).end], special=True)[end]

    def sample_ids(
        self, state: dict[str, Any], n: int, *, temperature: float = 1.0, max_tokens: int = 256, seed: int = 0
    ) -> list[tuple[list[int], float]]:
        """As `sample`, the token ids of the responses: what is exact, since a text may have others."""
        prompt = self._tokens([state]).prompt(0).astype(np.int64)
        ids = torch.from_numpy(prompt)[None].to(next(self.model.parameters()).device)
        end = self._end[-1]
        # of our own, since a checkpoint's may penalise repetitions or cut the tail, and scores would not be the model's
        plain = GenerationConfig(
            do_sample=True, top_k=0, top_p=1.0, output_scores=True, return_dict_in_generate=True, eos_token_id=end,
            pad_token_id=end,
        )  # fmt: skip
        packed = self.model.config._attn_implementation
        self.model.set_attn_implementation("sdpa")  # a cache of keys is filled as no packed row is
        try:
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(seed)
                out = self.model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), temperature=temperature,
                    num_return_sequences=n, max_new_tokens=max_tokens, generation_config=plain,
                )  # fmt: skip
        finally:
            self.model.set_attn_implementation(packed)
        said = out.sequences[:, ids.shape[1] :]
        scores = torch.stack(out.scores, dim=1).double().log_softmax(-1).gather(-1, said[..., None])[..., 0]
        ends = (said == end).long()
        within = ends.cumsum(-1) - ends == 0  # up to the first end, itself included
        logprobs = scores.where(within, 0.0).sum(-1).tolist()
        return [(row[own].tolist(), p) for row, own, p in zip(said, within, logprobs, strict=True)]

    def act(
        self,
        state: dict[str, Any],
        candidates: Sequence[str] | None = None,
        *,
        n: int = 1,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> Choice:
        """One action of `candidates` (or the state's own), drawn from pi among them; else the likeliest of `n` samples.

        Temperature 0 takes the likeliest candidate.
        """
        asked = candidates if candidates is not None else state.get("candidates")
        if not asked:
            if not temperature:
                raise UserError("temperature=0 is the likeliest of candidates: give some, or draw n samples above 0")
            drawn = self.sample(state, n, temperature=temperature, seed=seed)
            actions, logprobs = map(list, zip(*drawn, strict=True))
            best = int(np.argmax(logprobs))
            return Choice(actions[best], logprobs[best], actions, logprobs)
        (logprobs,) = self.logprobs([{**state, "candidates": list(asked)}])
        return _chosen([_text(c) for c in asked], logprobs, temperature, seed)


class Reranker:
    """A policy that takes what a critic thinks best, of candidates or of what another policy proposes.

    With `proposer`, best of n (Q reranking of a frozen policy: Best-of-Q, 2601.22701); the values decide alone.
    """

    def __init__(self, critic: Critic, proposer: Policy | None = None) -> None:
        if not critic.config["has_q"]:
            raise UserError("a critic without Q cannot choose: train one such as algo=iql_lm")
        self.critic, self.proposer = critic, proposer

    def act(
        self,
        state: dict[str, Any],
        candidates: Sequence[str] | None = None,
        *,
        n: int = 8,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Choice:
        """One action, drawn from softmax(Q / temperature), or the argmax at 0.

        Chosen from are `candidates` (or the state's own), else the different ones of `n` samples of the proposer.

        Raises:
            UserError: neither candidates nor a proposer.
        """
        asked = list(candidates if candidates is not None else state.get("candidates") or ())
        if not asked:
            if self.proposer is None:
                raise UserError("no candidates to choose from, and no policy to propose them: give `candidates`")
            asked = list(dict.fromkeys(text for text, _ in self.proposer.sample(state, n, seed=seed)))
        (score,) = self.critic.score([{**state, "candidates": asked}])
        q = np.array(score.q)
        return replace(_chosen([_text(c) for c in asked], q, temperature, seed), values=q.tolist())


def _chosen(actions: list[str], scores: Array, temperature: float, seed: int) -> Choice:
    """Drawn from softmax(scores / temperature); at 0 the first of the best."""
    if temperature:
        among = log_softmax(scores / temperature)
    else:
        among = np.where(np.arange(len(scores)) == np.argmax(scores), 0.0, -np.inf)
    chosen = int(np.random.default_rng(seed).choice(len(actions), p=np.exp(among)))
    return Choice(actions[chosen], float(among[chosen]), actions, among.tolist())


def _text(candidate: Any) -> str:
    return candidate if isinstance(candidate, str) else candidate["action"]


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
        return str(Path(path) / "actor") if (Path(path) / FILE).is_file() else path
    return str(find_run_folder(path.removeprefix("run:"), store_url, FILE) / "actor")

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
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offline_lm.batches.render import frame
from offline_lm.batches.tokens import Tokens, encode, tokenize, tokenizer_id
from offline_lm.envs.policies import greedy
from offline_lm.errors import UserError
from offline_lm.losses.ilql import perturbed_logprobs
from offline_lm.losses.td import ensemble_min
from offline_lm.models import acting, backbone, generation, token_heads
from offline_lm.models.acting import Chosen
from offline_lm.models.critic import Critic, find_run_folder, state_row
from offline_lm.models.devices import row_tokens
from offline_lm.models.generation import Response
from offline_lm.models.token_heads import TokenHeads

Array = np.ndarray
FILE = "policy.json"


@dataclass(frozen=True)
class Choice:
    """What a policy does.

    Attributes:
        action: the response chosen, a text.
        logprob: its log-probability among `actions`; of a single sample, under the model.
        actions: all that it chose from, each once.
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

    @cached_property
    def tokenizer_id(self) -> str:
        """What steps that it writes call its tokenizer."""
        return tokenizer_id(self.tokenizer)

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
        tokens, out = self._token_logprobs(list(states), token_budget)
        sums = acting.of_responses(tokens, np.arange(len(tokens.response_ptr) - 1), out)
        return [sums[tokens.candidate_branch[a:b]] for a, b in pairwise(tokens.candidate_ptr.tolist())]

    def token_logprobs(self, states: Iterable[dict[str, Any]]) -> list[tuple[list[int], list[Response]]]:
        """As `logprobs`, token by token: of each state the ids of its prompt, and of each candidate (ids, logprobs)."""
        tokens, out = self._token_logprobs(list(states), None)
        ptr = tokens.response_ptr
        said = [Response(tokens.response(a).tolist(), out[ptr[a] : ptr[a + 1]].tolist()) for a in range(len(ptr) - 1)]
        return [
            (tokens.prompt(n).tolist(), [said[b] for b in tokens.candidate_branch[slice(*own)]])
            for n, own in enumerate(pairwise(tokens.candidate_ptr.tolist()))
        ]

    @torch.no_grad()
    def _token_logprobs(self, asked: list[dict[str, Any]], token_budget: int | None) -> tuple[Tokens, Array]:
        """log pi of every token of the responses of `Tokens`, float64, end to end."""
        for number, state in enumerate(asked):
            if not state.get("candidates"):
                raise UserError(f"input record {number}: it needs `candidates` to choose from")
        tokens = self._tokens(asked)
        # states that begin alike stand together, so that what they share is encoded once
        order = np.array(sorted(range(len(tokens)), key=lambda n: tokens.prompt(n).tobytes()), np.int64)
        responses = [list(range(int(tokens.branch_ptr[n]), int(tokens.branch_ptr[n + 1]))) for n in order]
        every, out = np.arange(len(tokens.response_ptr) - 1), np.zeros(len(tokens.response_ids))
        budget = token_budget or row_tokens(next(self.model.parameters()).device)
        for part in Chosen(order, responses).rows(tokens, budget):
            if self.heads is None:
                found, _ = acting.response_logprobs(self.model, tokens, part)
            else:
                beta = self.config["ilql"]["beta"]
                found = token_heads.response_logprobs(self.model, self.heads, tokens, part, beta=beta)
            out[acting.spans(tokens, part.branches, every)] = found.double().cpu().numpy()
        return tokens, out

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
        return [(self.text(ids), logprob) for ids, logprob in drawn]

    def text(self, ids: list[int]) -> str:
        """What a response says, without what closes it."""
        end = end_of(self.tokenizer)
        return self.tokenizer.decode(ids[: -len(end)] if ids[-len(end) :] == end else ids)

    def sample_ids(
        self, state: dict[str, Any], n: int, *, temperature: float = 1.0, max_tokens: int = 256, seed: int = 0
    ) -> list[tuple[list[int], float]]:
        """As `sample`, the token ids of the responses: what is exact, since a text may have others."""
        options: Any = {"temperature": temperature, "max_tokens": max_tokens}
        (drawn,) = self.generate(self.prompts([state]), n, [np.random.default_rng(seed)], **options)
        return [(each.ids, each.logprob) for each in drawn]

    def prompts(self, states: Iterable[dict[str, Any]]) -> list[list[int]]:
        """Token ids of what stands before a response. Raises UserError for a state too long to read."""
        tokens = self._tokens(list(states))
        return [tokens.prompt(n).tolist() for n in range(len(tokens))]

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, rngs: Sequence[np.random.Generator], **options: Any
    ) -> list[list[Response]]:
        """`n` responses to each prompt; arguments and options as of `models.generation.generate`."""
        scores = None if self.heads is None else self._perturbed
        return generation.generate(
            self.model, prompts, n, rngs, end=end_of(self.tokenizer)[-1], scores=scores, **options
        )

    def _perturbed(self, logits: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Scores of ILQL's policy, as `token_heads.response_logprobs` has them."""
        assert self.heads is not None
        beta = self.config["ilql"]["beta"] / self.heads.unit
        return perturbed_logprobs(logits.float(), ensemble_min(self.heads.q(hidden)), beta=beta)

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
        different, actions = _different(asked)
        (logprobs,) = self.logprobs([{**state, "candidates": different}])
        return _chosen(actions, logprobs, temperature, seed)


class Reranker:
    """A policy that takes what a critic thinks best, of candidates or of what another policy proposes.

    With `proposer`, best of n (Q reranking of a frozen policy: Best-of-Q, 2601.22701); the values decide alone.
    """

    def __init__(self, critic: Critic, proposer: Policy | None = None) -> None:
        if not critic.config["has_q"]:
            raise UserError("a critic without Q cannot choose: train one such as algo=iql_lm")
        self.critic, self.proposer = critic, proposer

    def values(self, states: Iterable[dict[str, Any]]) -> list[Array]:
        """Q of the candidates of each state, float64; all of them are read together."""
        return [np.array(score.q) for score in self.critic.score(states)]

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
            asked = [text for text, _ in self.proposer.sample(state, n, seed=seed)]
        different, actions = _different(asked)
        (q,) = self.values([{**state, "candidates": different}])
        return replace(_chosen(actions, q, temperature, seed), values=q.tolist())


def _chosen(actions: list[str], scores: Array, temperature: float, seed: int) -> Choice:
    """Drawn from softmax(scores / temperature); at 0 the first of the best."""
    p = greedy(scores, temperature)
    with np.errstate(divide="ignore"):
        among = np.log(p)
    chosen = int(np.random.default_rng(seed).choice(len(actions), p=p))
    return Choice(actions[chosen], float(among[chosen]), actions, among.tolist())


def _different(candidates: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """The candidates and their actions, without those that say what another says: they would double its probability."""
    out: dict[tuple[str, str], Any] = {}
    for c in candidates:
        action = c if isinstance(c, str) else c["action"]
        said = action if isinstance(c, str) or c.get("response") is None else c["response"]
        out.setdefault((action, said), c)
    return list(out.values()), [action for action, _ in out]


def end_of(tokenizer: Any) -> list[int]:
    """What closes a response, as policies are trained on it; where they sample, its last token ends one."""
    return encode(tokenizer, [end := frame(tokenizer).end], special=True)[end]


def save_policy(folder: Path, model: Any, tokenizer: Any, config: dict[str, Any]) -> None:
    """Write an actor and how it reads pages."""
    backbone.save(model, tokenizer, folder / "actor")
    (folder / FILE).write_text(json.dumps(config, indent=2))


def start_of(path: str, store_url: str) -> str:
    """The folder or hub name that `actor.path` means: a model, or `run:RUN`, the actor of that run."""
    if not path.startswith("run:"):
        return str(Path(path) / "actor") if (Path(path) / FILE).is_file() else path
    return str(find_run_folder(path.removeprefix("run:"), store_url, FILE) / "actor")

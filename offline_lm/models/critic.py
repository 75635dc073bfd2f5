"""A trained critic: backbone, tokenizer and heads, saved as one folder and read back from it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from safetensors.torch import load_file, save_file

from offline_lm.batches.pack import pack, rows
from offline_lm.batches.tokens import tokenize
from offline_lm.errors import UserError
from offline_lm.models import backbone
from offline_lm.models.heads import Heads

_KEYS = (
    "goal", "start_url", "url", "observation", "messages", "observation_error", "response", "action",
    "tokenizer_id", "prompt_token_ids", "response_token_ids",
)  # fmt: skip
_TEXTS = _KEYS[:8]


@dataclass(frozen=True)
class Score:
    """v: V(s). q: [C] the least of the ensemble's Q(s, a) for each action asked for; None where Q is untrained."""

    v: float
    q: list[float] | None


class Critic:
    """V(s) and Q(s, a) for texts.

    >>> critic = Critic.from_pretrained("STORE/runs/RUN_ID")
    >>> critic.score([{"goal": "Buy a red mug", "observation": "...", "candidates": ["click[4]", "back"]}])
    """

    def __init__(self, model: Any, tokenizer: Any, heads: Heads, config: dict[str, Any]) -> None:
        self.model, self.tokenizer, self.heads, self.config = model.eval(), tokenizer, heads.eval(), config

    @classmethod
    def from_pretrained(cls, run: str | Path) -> Critic:
        """Open the folder of a run.

        Raises:
            UserError: no critic there, or its backbone cannot be loaded.
        """
        folder = Path(run)
        if not (folder / "critic.json").is_file():
            raise UserError(f"{folder} holds no critic.json: give the folder of a run of fit, STORE/runs/RUN_ID")
        config = json.loads((folder / "critic.json").read_text())
        path = config["backbone"] or str(folder / "backbone")
        model, tokenizer = backbone.load(path, config["dtype"])
        heads = Heads(model.config.hidden_size, **config["heads"])
        heads.load_state_dict(load_file(folder / "heads.safetensors"))
        return cls(model, tokenizer, heads, config)

    def save(self, folder: Path, *, backbone_path: str | None) -> None:
        """Write heads and description, and the backbone too unless it stays what `backbone_path` names."""
        folder.mkdir(parents=True, exist_ok=True)
        if backbone_path is None:
            backbone.save(self.model, self.tokenizer, folder / "backbone")
        save_file(self.heads.state_dict(), folder / "heads.safetensors")
        config = {**self.config, "backbone": backbone_path, "heads": self.heads.options}
        (folder / "critic.json").write_text(json.dumps(config, indent=2))

    def score(self, states: Iterable[dict[str, Any]], *, chunk: int = 256, token_budget: int = 8192) -> Iterator[Score]:
        """Scores in the order of `states`, streamed: a chunk is tokenised, packed and encoded at a time.

        Args:
            states: dicts with `goal`, `observation` or `messages`, optionally `url`, `history` (past actions, oldest
                first), and `candidates` (texts, or dicts with `action`), or `action` or `response`, or neither.

        Raises:
            UserError: a state with nothing seen, or whose goal and last past action exceed the critic's `max_tokens`.
        """
        it = iter(states)
        done = 0
        while part := list(islice(it, chunk)):
            yield from self._score([_row(state, done + i) for i, state in enumerate(part)], done, token_budget)
            done += len(part)

    @torch.no_grad()
    def _score(self, steps: list[dict[str, Any]], done: int, token_budget: int) -> Iterator[Score]:
        tokens = tokenize(steps, self.tokenizer, max_tokens=self.config["max_tokens"], history=self.config["history"])
        if not tokens.usable.all():
            bad = done + int(np.flatnonzero(~tokens.usable)[0])
            limit = self.config["max_tokens"]
            raise UserError(f"input record {bad}: goal and last past action exceed the critic's max_tokens={limit}")
        lengths = (np.diff(tokens.prompt_ptr) + np.diff(tokens.response_ptr[tokens.branch_ptr])).tolist()
        device = next(self.model.parameters()).device
        for states in rows(lengths, token_budget):
            ids, layout = pack(tokens, states, [range(tokens.branch_ptr[n], tokens.branch_ptr[n + 1]) for n in states])
            hidden = backbone.hidden_states(self.model, ids.to(device), layout).float()
            at_v, at_q = layout.readouts()
            v = self.heads.values(hidden[at_v]).tolist()
            q = self.heads.q_values(hidden[at_q]).amin(dim=0).tolist()
            first = tokens.branch_ptr[states.start]
            for n, value in zip(states, v, strict=True):
                yield Score(value, self._ask(tokens, n, q, first, steps[n]))

    def _ask(self, tokens: Any, n: int, q: Sequence[float], first: int, step: dict[str, Any]) -> list[float] | None:
        if not self.config["has_q"]:
            return None
        if step["candidates"]:
            wanted = tokens.candidate_branch[tokens.candidate_ptr[n] : tokens.candidate_ptr[n + 1]]
        else:
            wanted = range(tokens.branch_ptr[n], tokens.branch_ptr[n + 1])
        return [q[a - first] for a in wanted]


def _row(state: dict[str, Any], number: int) -> dict[str, Any]:
    """One state as `tokenize` takes a step; every state is an episode of its own with the history it brings."""
    row = {key: state.get(key) for key in _KEYS}
    if isinstance(row["messages"], list):
        row["messages"] = orjson.dumps(row["messages"]).decode()  # as the store has them
    for key in _TEXTS:
        if row[key] is not None and not isinstance(row[key], str):
            raise UserError(f"input record {number}: `{key}` is {row[key]!r:.80}, where a text is wanted")
    if row["observation"] is None and row["messages"] is None:
        raise UserError(f"input record {number}: it needs `observation` or `messages`")
    row["candidates"] = [_candidate(c, number) for c in _list(state, "candidates", number)]
    row["past"] = _list(state, "history", number)
    if not all(isinstance(action, str) for action in row["past"]):
        raise UserError(f"input record {number}: `history` is a list of past actions, each a text")
    row["episode_id"] = str(number)
    return row


def _list(state: dict[str, Any], key: str, number: int) -> list[Any]:
    value = state.get(key)
    if value is not None and not isinstance(value, list | tuple):
        raise UserError(f"input record {number}: `{key}` is {value!r:.80}, where a list is wanted")
    return list(value or ())


def _candidate(c: Any, number: int) -> dict[str, Any]:
    if isinstance(c, str):
        c = {"action": c}
    if not isinstance(c, dict) or not isinstance(c.get("action"), str) or not isinstance(c.get("response"), str | None):
        raise UserError(
            f"input record {number}: a candidate is a text, or an object with a text `action`; this is {c!r:.80}"
        )
    return {"action": c["action"], "response": c.get("response"), "executed": c.get("executed")}

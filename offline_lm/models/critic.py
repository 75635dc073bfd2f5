"""A trained critic: backbone, tokenizer and heads, saved as one folder and read back from it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from safetensors.torch import load_file, save_file

from offline_lm.batches.pack import pack, state_rows
from offline_lm.batches.tokens import chunks, tokenize
from offline_lm.errors import UserError
from offline_lm.models import backbone
from offline_lm.models.devices import row_tokens
from offline_lm.models.heads import Heads
from offline_lm.store import Store

_KEYS = (
    "goal", "start_url", "url", "observation", "messages", "observation_error", "response", "action",
    "tokenizer_id", "prompt_token_ids", "response_token_ids",
)  # fmt: skip
_TEXTS = _KEYS[:8]
_SEEN = tuple(key for key in _KEYS if key not in ("response", "action", "response_token_ids"))
_CHARACTERS = 2**24
"""Text that is read ahead at most, but for the last state's."""


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
        if backbone_path is None:
            backbone.save(self.model, self.tokenizer, folder / "backbone")
        save_heads(folder, self.heads, self.config, backbone_path)

    def score(
        self, states: Iterable[dict[str, Any]], *, chunk: int = 1024, token_budget: int | None = None
    ) -> Iterator[Score]:
        """Scores in the order of `states`, streamed: at most a chunk of them is read ahead.

        Args:
            states: dicts with `goal`, `observation` or `messages`, optionally `url`, `history` (oldest first: past
                actions, or, for a critic of `data.context=turns`, objects with what was seen and done), and
                `candidates` (texts, or dicts with `action`), or `action` or `response`, or neither.
            chunk: states that are tokenised and packed together; fewer where their texts are long.
            token_budget: tokens in one forward pass; None: as many as suit the device.

        Raises:
            UserError: a state with nothing seen, or whose goal and last past action exceed the critic's `max_tokens`.
        """
        numbered = (state_row(state, number, self._shown) for number, state in enumerate(states))
        done = 0
        for part in chunks(numbered, chunk, _CHARACTERS):
            for number, score in enumerate(self._score(part, token_budget), done):
                if score is None:
                    limit = self.config["max_tokens"]
                    raise UserError(
                        f"input record {number}: goal and last past action exceed the critic's max_tokens={limit}"
                    )
                yield score
            done += len(part)

    def score_chunk(self, states: Iterable[dict[str, Any]], *, token_budget: int | None = None) -> list[Score | None]:
        """As `score`, all at once; None for a state whose goal and last past action exceed `max_tokens`."""
        return self._score([state_row(state, number, self._shown) for number, state in enumerate(states)], token_budget)

    @property
    def rendering(self) -> dict[str, Any]:
        """How `tokenize` is to render steps for it."""
        older = {"context": "actions", "grounding": False}  # as all was when runs were saved without saying so
        return {key: {**older, **self.config}[key] for key in ("max_tokens", "history", "context", "grounding")}

    @property
    def _shown(self) -> int | None:
        """How many items of its history a state shows at most."""
        return self.config["history"] if self.rendering["context"] == "actions" else None

    @torch.no_grad()
    def _score(self, steps: list[dict[str, Any]], token_budget: int | None) -> list[Score | None]:
        """Equal states are encoded once, with every action that is asked about there.

        States that begin alike stand together, so that what they share is encoded once. (An order by length would save
        nothing: packed rows hold no padding.)
        """
        distinct, asked = _distinct(steps)
        tokens = tokenize(distinct, self.tokenizer, **self.rendering)
        order = sorted(range(len(tokens)), key=lambda n: tokens.prompt(n).tobytes())
        asks = self.config["has_q"]
        branches = [range(a, b) if asks else range(0) for a, b in pairwise(tokens.branch_ptr.tolist())]
        device = next(self.model.parameters()).device
        v, q = np.zeros(len(tokens)), np.zeros(len(tokens.response_ptr) - 1)
        for span in state_rows(tokens, order, [branches[n] for n in order], token_budget or row_tokens(device)):
            states = order[span.start : span.stop]
            ids, layout = pack(tokens, states, [branches[n] for n in states])
            hidden = backbone.hidden_states(self.model, ids.to(device), layout).float()
            at_v, at_q = (at.to(device) for at in layout.readouts())
            v[states] = self.heads.values(hidden[at_v]).cpu().numpy()
            q[[a for n in states for a in branches[n]]] = self.heads.q_values(hidden[at_q]).amin(dim=0).cpu().numpy()

        def answer(n: int, own: slice) -> Score | None:
            if not tokens.usable[n]:
                return None
            if distinct[n]["candidates"]:
                wanted = tokens.candidate_branch[tokens.candidate_ptr[n] : tokens.candidate_ptr[n + 1]]
            else:
                wanted = np.arange(tokens.branch_ptr[n], tokens.branch_ptr[n + 1])
            return Score(float(v[n]), q[wanted[own]].tolist() if asks else None)

        return [answer(n, own) for n, own in asked]


def save_heads(folder: Path, heads: Heads, config: dict[str, Any], backbone_path: str | None) -> None:
    """Write heads and description beside a backbone that is in `folder / "backbone"`, or stays at `backbone_path`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(heads.state_dict(), folder / "heads.safetensors")
    described = {**config, "backbone": backbone_path, "heads": heads.options}
    (folder / "critic.json").write_text(json.dumps(described, indent=2))


def find_run(run: str, store_url: str) -> Path:
    """Folder of the run that ``run`` names, which holds a critic: `find_run_folder`."""
    return find_run_folder(run, store_url, "critic.json")


def find_run_folder(run: str, store_url: str, file: str) -> Path:
    """Folder of the run that ``run`` names: a folder itself, or a run id or ``latest`` of the store.

    A run lies where the table `runs` says; a store that was moved keeps those in its own runs/.

    Args:
        file: what the folder must hold: critic.json or policy.json.

    Raises:
        UserError: no such run, or its folder is gone or holds no such file.
    """
    if (Path(run) / file).is_file() or os.sep in run:
        return Path(run)  # from_pretrained says what a folder lacks
    store = Store.open(store_url)
    run_id = store.resolve_run(run)
    with store.connect() as db:
        found = db.execute("SELECT run_dir, status FROM runs WHERE run_id = ?", [run_id]).fetchone()
    recorded, status = found or (None, None)
    folders = [Path(recorded)] if recorded else []
    if store.is_local:
        folders.append(store.run_dir(run_id))
    for folder in folders:
        if (folder / file).is_file():
            return folder
    kind = file.removesuffix(".json")
    problem = f"has no {kind} in {folders[0]}" if folders and folders[0].is_dir() else f"is gone: no folder {recorded}"
    raise UserError(f"run {run_id} ({status}) {problem}; restore it, train again, or name another run or its folder")


def _distinct(steps: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[tuple[int, slice]]]:
    """The distinct states among `steps`; for each step the number of its state, and which actions there are its own.

    Steps with one action each at the same state become one state with these as candidates. A step with candidates of
    its own, or with logged ids of its response, is merged with its equals alone.
    """
    states: list[dict[str, Any]] = []
    asked: list[tuple[int, slice]] = []
    found: dict[Any, tuple[int, dict[str, int]]] = {}
    for step in steps:
        whole = bool(step["candidates"]) or step["response_token_ids"] is not None
        key = (
            tuple(_hashable(step[name]) for name in (_KEYS if whole else _SEEN)),
            tuple(past if isinstance(past, str) else tuple(past.values()) for past in step["past"]),
        )
        if whole:
            key = *key, tuple(tuple(c.values()) for c in step["candidates"])
        if key not in found:
            found[key] = len(states), {}
            own = step if whole else {**step, "action": None, "response": None, "candidates": []}
            states.append({**own, "episode_id": str(len(states))})
        n, texts = found[key]
        text = step["response"] if step["response"] is not None else step["action"]
        if whole:
            asked.append((n, slice(None)))
        elif text is None:
            asked.append((n, slice(0)))
        else:
            if text not in texts:
                texts[text] = len(texts)
                states[n]["candidates"].append({"action": text, "response": None, "executed": None})
            asked.append((n, slice(texts[text], texts[text] + 1)))
    return states, asked


def _hashable(value: Any) -> Any:
    return value if value is None or isinstance(value, str) else tuple(value)


def state_row(state: dict[str, Any], number: int, history: int | None) -> dict[str, Any]:
    """One state as `tokenize` takes a step, with what is shown of the history that it brings."""
    row = {key: state.get(key) for key in _KEYS}
    if isinstance(row["messages"], list):
        row["messages"] = orjson.dumps(row["messages"]).decode()  # as the store has them
    for key in _TEXTS:
        if row[key] is not None and not isinstance(row[key], str):
            raise UserError(f"input record {number}: `{key}` is {row[key]!r:.80}, where a text is wanted")
    if row["observation"] is None and row["messages"] is None:
        raise UserError(f"input record {number}: it needs `observation` or `messages`")
    row["candidates"] = [_candidate(c, number) for c in _list(state, "candidates", number)]
    past = _list(state, "history", number)
    row["past"] = [_past(p, number) for p in past[0 if history is None else max(len(past) - history, 0) :]]
    return row


_PAST = ("url", "observation", "messages", "observation_error", "action", "response")


def _past(past: Any, number: int) -> str | dict[str, Any]:
    """A past action, or a whole past turn, which a critic with `context=turns` reads as it does the present one."""
    if isinstance(past, str):
        return past
    if not isinstance(past, dict):
        raise UserError(
            f"input record {number}: `history` is a list of past actions, each a text or an object with what was seen"
            f" and done; this is {past!r:.80}"
        )
    turn = {key: past.get(key) for key in _PAST}
    if isinstance(turn["messages"], list):
        turn["messages"] = orjson.dumps(turn["messages"]).decode()
    for key, value in turn.items():
        if not isinstance(value, str | None):
            raise UserError(f"input record {number}: `history` has `{key}` {value!r:.80}, where a text is wanted")
    if not (turn["action"] or turn["response"]):
        raise UserError(f"input record {number}: a past turn in `history` needs `action` or `response`")
    return turn


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

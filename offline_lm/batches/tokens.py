"""Steps tokenised once: flat arrays of prompts and responses, memory-mapped, a step found in O(1)."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from offline_lm.batches import render

Array = np.ndarray


@dataclass(frozen=True)
class Tokens:
    """N states and the A responses to them, in the order of the steps that they were made from.

    Attributes:
        prompt_ids, prompt_ptr: ids of all prompts end to end; state n's are those at `prompt_ptr[n]:prompt_ptr[n+1]`.
        response_ids, response_ptr: the same for responses, end-of-turn token included.
        branch_ptr: int [N+1]; the responses of state n are `branch_ptr[n]:branch_ptr[n+1]`, the executed one first.
        acted: bool [N]; false for final observations and steps with no logged action.
        usable: bool [N]; false where goal and newest action alone exceed `max_tokens`: such a state has the frame's end
            for a prompt (so that there is a token to read at) and no responses, and takes part in nothing.
        candidate_ptr: int [N+1], and candidate_branch: int [C]: which response stands for each logged candidate.
        page: int64 [N]: hash of what the agent saw; equal pages have equal numbers.
        goal_ptr: int64 [N, 2]: where in its prompt a state's goal stands; 0, 0 in prompts whose ids were logged.
    """

    prompt_ids: Array
    prompt_ptr: Array
    response_ids: Array
    response_ptr: Array
    branch_ptr: Array
    acted: Array
    usable: Array
    candidate_ptr: Array
    candidate_branch: Array
    page: Array
    goal_ptr: Array
    cuts: render.Cuts

    def __len__(self) -> int:
        return len(self.acted)

    @property
    def n_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    def prompt(self, n: int) -> Array:
        return self.prompt_ids[self.prompt_ptr[n] : self.prompt_ptr[n + 1]]

    def response(self, a: int) -> Array:
        return self.response_ids[self.response_ptr[a] : self.response_ptr[a + 1]]

    def fingerprint(self) -> str:
        """sha256 of every id and every border: what features of these tokens depend on."""
        digest = hashlib.sha256()
        for array in (self.prompt_ids, self.prompt_ptr, self.response_ids, self.response_ptr, self.branch_ptr):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write every array as .npy; meta.json last, so that a folder with it is whole."""
        folder.mkdir(parents=True, exist_ok=True)
        for f in fields(self):
            if f.name != "cuts":
                np.save(folder / f"{f.name}.npy", getattr(self, f.name))
        (folder / "meta.json").write_text(json.dumps(asdict(self.cuts)))

    @classmethod
    def load(cls, folder: Path) -> Tokens:
        names = [f.name for f in fields(cls) if f.name != "cuts"]
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
        return cls(**arrays, cuts=render.Cuts(**json.loads((folder / "meta.json").read_text())))


def tokenize(steps: Iterable[dict[str, Any]], tokenizer: Any, *, max_tokens: int = 1024, history: int = 4) -> Tokens:
    """Render and tokenise steps, which come in episode order.

    Args:
        steps: rows with the columns of `select.STEP_COLUMNS`.
        tokenizer: a fast `transformers` tokenizer.
        max_tokens: longest prompt; a longer one is cut (see `render.assemble`). Responses come on top, whole: were they
            counted, the page that is read, and so V, would depend on which candidates are on offer.
        history: how many past actions a prompt shows.

    Stored token ids are taken verbatim where a step has them and was logged with this tokenizer. A special token
    that a page, goal or response spells out is tokenised as plain text: only the frame's own markers are special.
    """
    frame = render.frame(tokenizer)
    before, after, end = _encode(tokenizer, [frame.before, frame.after, frame.end], special=True)
    cuts = render.Cuts()
    wide = len(tokenizer) > 2**16
    prompts, responses = _Ragged(wide), _Ragged(wide)
    branch_ptr, acted, usable, candidate_ptr, candidate_branch = [0], [], [], [0], []
    pages: list[int] = []
    goals: list[tuple[int, int]] = []
    past: list[list[int]] = []
    episode = None

    for chunk in _chunks(steps, 512):
        texts = [t for row in chunk for t in _texts(row)]
        ids = iter(_encode(tokenizer, texts))
        for row in chunk:
            goal, page = next(ids), next(ids)
            options = [next(ids) + end for _ in _options(row)]
            if row["episode_id"] != episode:
                # a step scored by itself brings its past along
                episode = row["episode_id"]
                past = _encode(tokenizer, [render.past_text(a) for a in row.get("past", ())])
            own = row["tokenizer_id"] == tokenizer.name_or_path
            if own and row["response_token_ids"] is not None:
                options[0] = list(row["response_token_ids"])
            if own and row["prompt_token_ids"] is not None and len(row["prompt_token_ids"]) <= max_tokens:
                prompt, goal_at = list(row["prompt_token_ids"]), (0, 0)
            else:
                shown = past[-history:] if history else []
                prompt = render.assemble(before, shown, page, goal, after, max_tokens, cuts)
                end_of_goal = len(prompt or ()) - len(after)
                goal_at = (end_of_goal - len(goal), end_of_goal)
            fits = prompt is not None
            goals.append(goal_at if fits else (0, 0))
            pages.append(zlib.crc32(render.page_text(row).encode()))
            first = len(responses)
            prompts.add(prompt or after)
            has_action = _said(row) is not None
            for option in options if fits else []:
                responses.add(option)
            branch_ptr.append(len(responses))
            acted.append(has_action and fits)
            usable.append(fits)
            if fits:
                candidate_branch.extend(first + i for i in _candidate_index(row))
            candidate_ptr.append(len(candidate_branch))
            if has_action:
                past.append(_encode(tokenizer, [render.past_text(row["action"] or row["response"])])[0])
    return Tokens(
        prompts.ids(), prompts.ptr(), responses.ids(), responses.ptr(), np.asarray(branch_ptr),
        np.asarray(acted, bool), np.asarray(usable, bool),
        np.asarray(candidate_ptr), np.asarray(candidate_branch, np.int64),
        np.asarray(pages, np.int64), np.asarray(goals, np.int64).reshape(-1, 2), cuts,
    )  # fmt: skip


def _said(row: dict[str, Any]) -> str | None:
    """What the agent emitted: its whole response where that was logged, else the command."""
    return row["response"] if row["response"] is not None else row["action"]


def _options(row: dict[str, Any]) -> list[str]:
    """Distinct texts of the responses at a step: the executed one first, then the other candidates'."""
    said = _said(row)
    texts = {} if said is None else {said: None}
    for c in row["candidates"] or ():
        if not _executed(c, row):
            texts.setdefault(c["response"] if c["response"] is not None else c["action"], None)
    return list(texts)


def _executed(candidate: dict[str, Any], row: dict[str, Any]) -> bool:
    if _said(row) is None:
        return False
    if candidate["executed"] is not None:
        return candidate["executed"]
    return candidate["action"] == row["action"]


def _candidate_index(row: dict[str, Any]) -> list[int]:
    options = {text: i for i, text in enumerate(_options(row))}
    texts = (c["response"] if c["response"] is not None else c["action"] for c in row["candidates"] or ())
    return [0 if _executed(c, row) else options[t] for c, t in zip(row["candidates"] or (), texts, strict=True)]


def _texts(row: dict[str, Any]) -> list[str]:
    return [render.goal_text(row["goal"], row["start_url"]), render.page_text(row), *_options(row)]


def _encode(tokenizer: Any, texts: list[str], *, special: bool = False) -> list[list[int]]:
    """Ids of each text; special tokens that it spells out are such only where `special`."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=not special)["input_ids"]


def _chunks(rows: Iterable[dict[str, Any]], n: int) -> Iterator[list[dict[str, Any]]]:
    it = iter(rows)
    while chunk := list(islice(it, n)):
        yield chunk


class _Ragged:
    """Rows of ids appended one at a time, kept in compact arrays rather than Python ints."""

    def __init__(self, wide: bool) -> None:
        self._dtype = np.uint32 if wide else np.uint16
        self._rows: list[Array] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, ids: list[int]) -> None:
        self._rows.append(np.asarray(ids, self._dtype))

    def ids(self) -> Array:
        return np.concatenate(self._rows) if self._rows else np.zeros(0, self._dtype)

    def ptr(self) -> Array:
        return np.concatenate([[0], np.cumsum([len(r) for r in self._rows])]).astype(np.int64)

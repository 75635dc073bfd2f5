"""Steps tokenised once: flat arrays of prompts and responses, memory-mapped, a step found in O(1)."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from offline_lm.batches import render
from offline_lm.batches.grounding import notes

Array = np.ndarray

COMPARED = 64
"""Shared prefixes shorter than this many tokens are not told from none: nobody packs them once."""

_CHUNK_STEPS, _CHUNK_TEXT = 512, 16 * 2**20
"""Steps, and characters, that go to the tokenizer in one call, which works on them with all cores and without the GIL.
From 64 texts on more of them make it no faster; the second bounds memory where pages are huge."""


@dataclass(frozen=True, eq=False)
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
        cut: int32 [N, 4]: the fields of `render.Cuts` for each state.
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
    cut: Array

    def __len__(self) -> int:
        return len(self.acted)

    @property
    def n_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def cuts(self) -> render.Cuts:
        """How much did not fit, of all states together."""
        return render.Cuts(*self.cut.sum(axis=0, dtype=np.int64).tolist())

    def prompt(self, n: int) -> Array:
        return self.prompt_ids[self.prompt_ptr[n] : self.prompt_ptr[n + 1]]

    def response(self, a: int) -> Array:
        return self.response_ids[self.response_ptr[a] : self.response_ptr[a + 1]]

    def part(self, start: int, stop: int) -> Tokens:
        """States `start:stop` by themselves; ids are views."""
        prompts, branches, candidates = (
            ptr[start : stop + 1] for ptr in (self.prompt_ptr, self.branch_ptr, self.candidate_ptr)
        )
        responses = self.response_ptr[branches[0] : branches[-1] + 1]
        return Tokens(
            self.prompt_ids[prompts[0] : prompts[-1]], prompts - prompts[0],
            self.response_ids[responses[0] : responses[-1]], responses - responses[0],
            branches - branches[0], self.acted[start:stop], self.usable[start:stop],
            candidates - candidates[0], self.candidate_branch[candidates[0] : candidates[-1]] - branches[0],
            self.page[start:stop], self.goal_ptr[start:stop], self.cut[start:stop],
        )  # fmt: skip

    @classmethod
    def joined(cls, parts: Iterable[Tokens]) -> Tokens:
        """All of them end to end."""
        columns: dict[str, list[Array]] = {f.name: [] for f in fields(cls)}
        for rebased in moved(parts):
            for name, array in rebased.items():
                columns[name].append(array)
        return cls(**{name: np.concatenate(arrays) for name, arrays in columns.items()})

    def shared_with_previous(self, states: Array) -> Array:
        """int64 [S]: how many first tokens the prompt of each of these states shares with the one before it here.

        0 for the first of them, and where fewer than `COMPARED` are shared.
        """
        shared = np.zeros(len(states), np.int64)
        starts = self.prompt_ptr[states]
        lengths = self.prompt_ptr[states + 1] - starts
        long = np.flatnonzero((lengths[1:] >= COMPARED) & (lengths[:-1] >= COMPARED)) + 1
        for at in (COMPARED - 1, COMPARED // 2):  # few begin alike, and these are enough to tell most of them
            long = long[self.prompt_ids[starts[long] + at] == self.prompt_ids[starts[long - 1] + at]]
        first = np.arange(COMPARED)
        for part in np.split(long, range(4096, len(long), 4096)):
            here, before = (self.prompt_ids[starts[i, None] + first] for i in (part, part - 1))
            for i in part[(here == before).all(axis=1)].tolist():
                shared[i] = common_prefix(self.prompt(int(states[i])), self.prompt(int(states[i - 1])))
        return shared

    def fingerprint(self) -> str:
        """sha256 of every id and every border: what features of these tokens depend on."""
        digest = hashlib.sha256()
        for array in (self.prompt_ids, self.prompt_ptr, self.response_ids, self.response_ptr, self.branch_ptr):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    @classmethod
    def load(cls, folder: Path) -> Tokens:
        """Tokens that `token_cache.write` wrote, memory-mapped."""
        # plain arrays over the maps: a slice of np.memmap costs several microseconds
        return cls(**{f.name: np.asarray(np.load(folder / f"{f.name}.npy", mmap_mode="r")) for f in fields(cls)})


def common_prefix(a: Array, b: Array) -> int:
    """How many first numbers two arrays share."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    at = int(differ.argmax()) if n else 0
    return at if n and differ[at] else n


def moved(parts: Iterable[Tokens]) -> Iterator[dict[str, Array]]:
    """The columns of every part as they stand behind the parts before it: pointers moved, their first 0 only once."""
    prompts = responses = branches = candidates = 0
    first = True
    for part in parts:
        columns = {f.name: getattr(part, f.name) for f in fields(part)}
        bases = {
            "prompt_ptr": prompts, "response_ptr": responses, "branch_ptr": branches, "candidate_ptr": candidates,
        }  # fmt: skip
        for name, base in bases.items():
            columns[name] = columns[name][0 if first else 1 :] + base
        columns["candidate_branch"] = columns["candidate_branch"] + branches
        yield columns
        first = False
        prompts, responses = prompts + len(part.prompt_ids), responses + len(part.response_ids)
        branches, candidates = branches + int(part.branch_ptr[-1]), candidates + len(part.candidate_branch)


def tokenize(
    steps: Iterable[dict[str, Any]],
    tokenizer: Any,
    *,
    max_tokens: int = 1024,
    history: int = 4,
    context: str = "actions",
    grounding: bool = False,
) -> Tokens:
    """Render and tokenise steps, which come in episode order; see `tokenized_parts`."""
    options = {"max_tokens": max_tokens, "history": history, "context": context, "grounding": grounding}
    return Tokens.joined(tokenized_parts(steps, tokenizer, **options))


def tokenized_parts(
    steps: Iterable[dict[str, Any]],
    tokenizer: Any,
    *,
    max_tokens: int,
    history: int,
    context: str,
    grounding: bool = False,
) -> Iterator[Tokens]:
    """Tokens of consecutive steps, some hundred at a time; at least one part, which may be empty.

    Args:
        steps: rows with the columns of `replay.STEP_COLUMNS`, in episode order. A step that is scored by itself may
            bring its `past`: earlier actions as texts, or steps with the keys of a row.
        tokenizer: a fast `transformers` tokenizer.
        max_tokens: longest prompt; a longer one is cut (see `render`). Responses come on top, whole: were they
            counted, the page that is read, and so V, would depend on which candidates are on offer.
        history: how many past actions a prompt shows, where context is `actions`.
        context: what a prompt shows of the past, `actions` or whole `turns` (see `render`).
        grounding: whether a response is read with the line of the page that its action names (see `grounding`): for
            critics. What a policy is to say is its response alone.

    Stored token ids are taken verbatim where a step has them and was logged with this tokenizer (those of a response
    only where nothing is read behind it). A special token
    that a page, goal or response spells out is tokenised as plain text: only the frame's own markers are special.
    """
    frame, name = render.frame(tokenizer), ""
    marks = encode(tokenizer, (frame.before, frame.after, frame.end), special=True)
    before, after, end = (marks[text] for text in (frame.before, frame.after, frame.end))
    kind = np.uint32 if len(tokenizer) > 2**16 else np.uint16
    past_text = render.past_text if context == "actions" else render.turn_text
    past: render.Past = render.Actions(history)
    episode = None
    empty = True
    for chunk in chunks(steps, _CHUNK_STEPS, _CHUNK_TEXT):
        empty = False
        read = [_read(row, grounding) for row in chunk]
        shown = zip(chunk, read, strict=True)
        ids = encode(tokenizer, (t for row, options in shown for t in _texts(row, options, past_text, context)))
        part = _Part(kind)
        for row, texts in zip(chunk, read, strict=True):
            goal, page = (ids[text] for text in _asked(row))
            if row["episode_id"] != episode:
                episode = row["episode_id"]
                past = render.Actions(history) if context == "actions" else render.Turns()
                for earlier, said in _brought(row, context):
                    past.prompt(before, ids[earlier], goal, after, max_tokens, render.Cuts())
                    past.add(ids[earlier], ids[past_text(said)])
            cuts = render.Cuts()
            prompt = past.prompt(before, page, goal, after, max_tokens, cuts)
            goal_end = len(prompt or ()) - len(after)
            goal_at = (goal_end - len(goal), goal_end)
            options = [ids[text] + end for text in texts]
            if row["tokenizer_id"] is not None:
                name = name or tokenizer_id(tokenizer)  # not for nothing: it reads the whole vocabulary
            own = row["tokenizer_id"] == name
            if own and row["response_token_ids"] is not None and texts[0] == _said(row):
                options[0] = list(row["response_token_ids"])
            if own and row["prompt_token_ids"] is not None and len(row["prompt_token_ids"]) <= max_tokens:
                prompt, goal_at, cuts = list(row["prompt_token_ids"]), (0, 0), render.Cuts()
            part.add(row, prompt, after, goal_at, options, cuts)
            if _said(row) is not None:
                past.add(page, ids[past_text(row["action"] or row["response"])])
        yield part.tokens()
    if empty:
        yield _Part(kind).tokens()


class _Part:
    """Columns of `Tokens` under construction."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.prompts: list[list[int]] = []
        self.responses: list[list[int]] = []
        self.branch_ptr, self.candidate_ptr = [0], [0]
        self.candidate_branch: list[int] = []
        self.acted: list[bool] = []
        self.usable: list[bool] = []
        self.pages: list[int] = []
        self.goals: list[tuple[int, int]] = []
        self.cuts: list[tuple[int, ...]] = []

    def add(
        self,
        row: dict[str, Any],
        prompt: list[int] | None,
        instead: list[int],
        goal_at: tuple[int, int],
        options: list[list[int]],
        cuts: render.Cuts,
    ) -> None:
        fits = prompt is not None
        if fits:
            first = len(self.responses)
            self.responses += options
            self.candidate_branch += [first + i for i in _candidate_index(row)]
        self.prompts.append(prompt or instead)
        self.branch_ptr.append(len(self.responses))
        self.candidate_ptr.append(len(self.candidate_branch))
        self.acted.append(fits and _said(row) is not None)
        self.usable.append(fits)
        self.pages.append(zlib.crc32(render.page_text(row).encode()))
        self.goals.append(goal_at if fits else (0, 0))
        self.cuts.append(cuts.counts())

    def tokens(self) -> Tokens:
        n = len(self.prompts)
        return Tokens(
            *self._ragged(self.prompts), *self._ragged(self.responses), np.array(self.branch_ptr),
            np.array(self.acted, bool), np.array(self.usable, bool),
            np.array(self.candidate_ptr), np.array(self.candidate_branch, np.int64),
            np.array(self.pages, np.int64), np.array(self.goals, np.int64).reshape(n, 2),
            np.array(self.cuts, np.int32).reshape(n, 4),
        )  # fmt: skip

    def _ragged(self, rows: list[list[int]]) -> tuple[Array, Array]:
        ptr = np.cumsum([0, *map(len, rows)])
        return np.fromiter(chain.from_iterable(rows), self.kind, ptr[-1]), ptr


def _asked(row: dict[str, Any]) -> tuple[str, str]:
    return render.goal_text(row["goal"], row["start_url"]), render.page_text(row)


def _brought(row: dict[str, Any], context: str) -> Iterator[tuple[str, str]]:
    """Pages and actions of the past that a step brings along; no page where it is an action's text alone."""
    for earlier in row.get("past", ()):
        if isinstance(earlier, str):
            yield "", earlier
        else:
            page = render.page_text(earlier) if context == "turns" else ""
            yield page, earlier.get("action") or earlier["response"]


def _texts(row: dict[str, Any], options: list[str], past_text: Callable[[str], str], context: str) -> Iterator[str]:
    """All that is tokenised for a step."""
    yield from _asked(row)
    yield from options
    if _said(row) is not None:
        yield past_text(row["action"] or row["response"])
    for page, said in _brought(row, context):
        yield page
        yield past_text(said)


def _read(row: dict[str, Any], grounding: bool) -> list[str]:
    """The responses at a step, as they are read."""
    options = _options(row)
    if not grounding:
        return list(options)
    return [text + line for text, line in zip(options, notes(options.values(), row["observation"]), strict=True)]


def _said(row: dict[str, Any]) -> str | None:
    """What the agent emitted: its whole response where that was logged, else the command."""
    return row["response"] if row["response"] is not None else row["action"]


def _options(row: dict[str, Any]) -> dict[str, str]:
    """Distinct responses at a step, the executed one first, then the other candidates, each with its action."""
    said = _said(row)
    texts = {} if said is None else {said: row["action"] or said}
    for c in row["candidates"] or ():
        if not _executed(c, row):
            text = c["response"] if c["response"] is not None else c["action"]
            texts.setdefault(text, c["action"] or text)
    return texts


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


def tokenizer_id(tokenizer: Any) -> str:
    """What a step calls the tokenizer whose ids it holds: its hub name; of one in a folder, which may be copied or
    change, the hash of what it does."""
    name = tokenizer.name_or_path
    if name and not Path(name).exists():
        return name
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return f"sha256:{hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]}"


def encode(tokenizer: Any, texts: Iterable[str], *, special: bool = False) -> dict[str, list[int]]:
    """Ids of each distinct text; special tokens that it spells out are such only where `special`."""
    distinct = list(dict.fromkeys(texts))
    backend = tokenizer.backend_tokenizer
    # as `transformers` does before every call, and without its making of masks and types
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = not special
    found = backend.encode_batch_fast(distinct, add_special_tokens=False)
    return dict(zip(distinct, (encoding.ids for encoding in found), strict=True))


def chunks(steps: Iterable[dict[str, Any]], most: int, characters: int) -> Iterator[list[dict[str, Any]]]:
    """Consecutive steps: at most `most`, and none behind `characters` of what was seen."""
    part: list[dict[str, Any]] = []
    held = 0
    for step in steps:
        part.append(step)
        held += len(step["observation"] or "") + len(step["messages"] or "")
        if len(part) == most or held >= characters:
            yield part
            part, held = [], 0
    if part:
        yield part

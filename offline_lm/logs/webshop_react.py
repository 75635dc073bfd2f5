"""WebShop episodes as the ReAct notebook prints them (Yao et al. 2023): a transcript on standard output.

An episode begins with a line of dashes and its number; then ``Action: ..`` and ``Observation: ..`` follow each other,
the first action being the harness's own ``reset``, whose answer is the first page. It ends with ``n mean success
failed`` over the episodes so far.

- A step is one action of the model; its observation is the answer to the action before. The last answer is the final
  observation. ``think[..]`` is an action that the shop answers with ``OK.``
- ``Invalid action!`` gives ``action_valid=False``.
- The score stands only in the answer to Buy Now: it is that action's reward, the others have 0. ``success`` is
  score == 1.
- The harness makes 15 calls, ``reset`` among them, and then returns 0: an episode that never buys has the outcome 0
  (flag ``no_score``), is truncated and ends with ``step_limit``. The means that the notebook prints count it so.
- Buy Now may be answered with an empty page, where the shop failed to show the score. The harness counts 0 and so
  does this; flags ``no_score`` and ``empty_score_page``, ``end_reason=env_error``.
- The output of a notebook may be cut: an episode without score and without its closing line has no outcome (flags
  ``cut_log``, ``unlabelled``).
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from offline_lm.logs import _files, _webshop
from offline_lm.logs._adapters import Sample, contents, give_outcome, numbered, rejected
from offline_lm.logs._files import TOTAL_BYTES
from offline_lm.logs._records import Bad
from offline_lm.types import Episode, Rejected

SOURCE = "webshop_react"
SUFFIXES = (".txt", ".txt.gz", ".txt.zst", ".out")
CALLS = 15
"""of the environment in one episode, the reset among them"""
_BEGIN = re.compile(rb"^-{10,}\r?\n(\d{1,9})\r?\nAction: reset\r?\n(?=Observation:)", re.MULTILINE)
_TURN = re.compile(r"^Action: ([^\n]*)\nObservation: ?", re.MULTILINE)
_CLOSING = re.compile(r"\n(\d+) (\S+) (\S+) (\S+)\n-{10,}\s*\Z")
_PENDING = re.compile(r"\n+Action: ([^\n]*)\n?\Z")


def detect(sample: Sample) -> str | None:
    head = sample.head
    return "a ReAct transcript of WebShop" if b"Instruction:" in head and _BEGIN.search(head) else None


def find(path: Path) -> Iterator[Path]:
    return _files.find(path, SUFFIXES)


def read(path: Path, *, model: str | None = None) -> Iterator[Episode | Rejected]:
    """Every episode of a transcript, or of those under a folder. `model` names the model, which they do not say.

    Raises UserError for a folder without transcripts.
    """
    return chain.from_iterable(_read_file(file, model) for file in find(path))


def _read_file(path: Path, model: str | None) -> Iterator[Episode | Rejected]:
    try:
        data = contents(path, TOTAL_BYTES)
    except Bad as bad:
        yield rejected(SOURCE, path, bad)
        return
    found = list(_BEGIN.finditer(data))
    before = data[: found[0].start() if found else None]
    if not data.strip():
        yield rejected(SOURCE, path, Bad("empty_file", "the file holds no episode; was it written to the end?"))
    elif before.strip():
        bad = Bad("unknown_format", "this text belongs to no episode; one begins with a line of dashes and a number")
        yield rejected(SOURCE, path, bad, 0, before)
    ends = [*(match.start() for match in found), len(data)]
    seen: Counter[int] = Counter()
    for match, (start, end) in zip(found, pairwise(ends), strict=True):
        block, number = data[start:end], int(match[1])
        seen[number] += 1
        # The notebook may have run more than once: the second run's episodes are others.
        native_id = f"{number}" if seen[number] == 1 else f"{number}#{seen[number]}"
        try:
            episode = _episode(_webshop.decode(data[match.end() : end]).replace("\r\n", "\n"))
            yield Episode(
                **episode,
                source=SOURCE,
                native_id=native_id,
                dataset=path.name.split(".")[0],
                benchmark="webshop",
                task_id=f"webshop/fixed_{number}",
                site="webshop",
                policy_kind="llm",
                agent="ReAct",
                model=model,
                uri=str(path),
                sha256=hashlib.sha256(block).hexdigest(),
            )
        except Bad as bad:
            yield rejected(SOURCE, path, bad, start, block)


def _episode(text: str) -> dict[str, Any]:
    """The fields of an episode from its text, which begins with the answer to ``reset``."""
    closing = _CLOSING.search(text)
    if closing:
        text = text[: closing.start()]
    parts = _TURN.split(text.removeprefix("Observation:").removeprefix(" "))
    pages, actions = [page.rstrip("\n") for page in parts[::2]], parts[1::2]
    extra: dict[str, Any] = {}
    if not closing and (pending := _PENDING.search(pages[-1])):
        extra["cut_action"] = pending[1]  # its answer, and perhaps its end, are lost
        pages[-1] = pages[-1][: pending.start()]
    if not actions:
        raise Bad("no_steps", "the episode holds no action of the model; leave it out")
    steps: list[dict[str, Any]] = []
    for page, action, answer in zip(pages, actions, pages[1:], strict=False):
        step = {"observation": page, "observation_kind": "text", "response": action, **_webshop.action_fields(action)}
        step["action_valid"] = answer != _webshop.INVALID
        if answer == _webshop.INVALID:
            step["action_error"] = answer
        steps.append(step)
    bought = actions[-1] == _webshop.BUY and steps[-1]["action_valid"]
    reward = _webshop.score(pages[-1]) if bought else None
    end, flags = _end(bought, reward, closing is not None, len(actions), pages[-1])
    if reward is None and closing:
        reward = 0.0
    give_outcome(steps, reward)
    for step in steps:
        if reward is not None:
            step["reward_source"] = "env"
    steps[-1] |= {"terminated": end["terminated"], "truncated": end["truncated"]}
    steps.append({"observation": pages[-1], "observation_kind": "text", "is_final_observation": True})
    return end | {
        "steps": numbered(steps),
        "goal": _webshop.goal(pages[0]),
        "outcome_reward": reward,
        "raw_reward": reward,
        "success": None if reward is None else reward == 1,
        "quality_flags": flags,
        "extra": extra,
    }


def _end(
    bought: bool, reward: float | None, closed: bool, count: int, last: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """How the episode ended, and its quality flags."""

    def end(terminated: bool | None, truncated: bool | None, reason: str) -> dict[str, Any]:
        return {"terminated": terminated, "truncated": truncated, "end_reason": reason}

    if reward is not None:
        return end(True, False, "env_done"), ()
    if not closed:
        return end(None, None, "unknown"), ("cut_log", "unlabelled")
    if bought:
        return end(True, False, "env_error"), ("no_score", "empty_score_page" if not last.strip() else "odd_score_page")
    if count >= CALLS - 1:
        return end(False, True, "step_limit"), ("no_score",)
    return end(None, None, "env_error"), ("no_score",)  # the harness stopped it: its fourth number counts these

"""From a step to the parts of its prompt, and from tokens of parts to one prompt within a budget.

A prompt is `frame | history | page | goal | frame`, a response follows it. The goal stands last, so that one
encoding of a page can be asked about many goals (`models.represent`). Each part is tokenised by itself and the ids
are joined, so that the boundary between prompt and response is a token boundary for every tokenizer
(DESIGN section 4, trap 6), and the tokens of [s; a] begin with the tokens of [s] whatever a is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

VERSION = "3"
"""Part of every cache key: raise it when the tokens of a prompt change."""


@dataclass(frozen=True, slots=True)
class Frame:
    """The constant text around the parts: a chat template's markers, or plain words.

    `end` closes a response and is part of it: an end-of-turn marker where the tokenizer has one, so that stopping
    is learnt (trap 7).
    """

    before: str
    after: str
    end: str


_HOLE = "\u241eprompt\u241e"


def frame(tokenizer: Any) -> Frame:
    """The frame of a `transformers` tokenizer: its chat template's if it has one, plain text otherwise."""
    if tokenizer.chat_template is None:
        return Frame(tokenizer.bos_token or "", "\nAction: ", tokenizer.eos_token)
    turn = [{"role": "user", "content": _HOLE}]
    asked = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    before, after = asked.split(_HOLE)
    reply = [*turn, {"role": "assistant", "content": _HOLE}]
    answered = tokenizer.apply_chat_template(reply, tokenize=False, add_generation_prompt=False)
    end = answered.rsplit(_HOLE, 1)[1].strip() or tokenizer.eos_token
    return Frame(before, after, end)


def goal_text(goal: str | None, start_url: str | None = None) -> str:
    return f"\nGoal: {goal or start_url or ''}"


def past_text(action: str) -> str:
    """One line of history: a past action, whole up to 200 characters (its end holds less than its start)."""
    return f"Did: {action if len(action) <= 200 else action[:200] + '…'}\n"


def page_text(step: dict[str, Any]) -> str:
    """What the agent saw: address, error of the last action, observation or the turn's messages."""
    lines = []
    if step.get("url"):
        lines.append(f"URL: {step['url']}")
    if step.get("observation_error"):
        lines.append(f"Error: {step['observation_error']}")
    lines.append(f"Page:\n{step.get('observation') or step.get('messages') or ''}")
    return "\n".join(lines)


@dataclass(slots=True)
class Cuts:
    """How much of the text did not fit, for the report."""

    pages: int = 0
    page_tokens: int = 0
    histories: int = 0
    too_long: int = 0

    def __add__(self, other: Cuts) -> Cuts:
        return Cuts(*(getattr(self, f) + getattr(other, f) for f in self.__slots__))


def assemble(
    before: Sequence[int],
    past: Sequence[Sequence[int]],
    page: Sequence[int],
    goal: Sequence[int],
    after: Sequence[int],
    room: int,
    cuts: Cuts,
) -> list[int] | None:
    """Join the parts into at most `room` tokens; None if goal and newest action alone do not fit.

    Cut first the oldest history, then the middle of the page; never the goal, the newest action or the frame.

    Args:
        past: token ids of past actions, oldest first.
        room: tokens that the prompt may take.
    """
    newest = list(past[-1]) if past else []
    left = room - len(before) - len(goal) - len(newest) - len(after)
    if left < min(len(page), 16):
        cuts.too_long += 1
        return None
    older: list[int] = []
    spare = left - len(page)
    for line in reversed(past[:-1]):
        if len(line) > spare:
            cuts.histories += 1
            break
        older = [*line, *older]
        spare -= len(line)
    if len(page) > left:
        cuts.pages += 1
        cuts.page_tokens += len(page) - left
        head = (left + 1) // 2
        page = [*page[:head], *page[len(page) - (left - head) :]]
    return [*before, *older, *newest, *page, *goal, *after]

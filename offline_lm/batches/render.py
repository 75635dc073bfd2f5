"""From a step to the parts of its prompt, and from tokens of parts to one prompt within a budget.

A prompt is `frame | past | page | goal | frame`, a response follows it. The goal stands last, so that one encoding
of a page can be asked about many goals (`models.represent`). The past is the last few actions, or whole turns: then
the prompts of an episode go on from one another but for goal and frame, and one pass encodes them all.

Each part is tokenised by itself and the ids are joined, so that the boundary between prompt and response is a token
boundary for every tokenizer (DESIGN section 4, trap 6), and the tokens of [s; a] begin with the tokens of [s] whatever
a is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, Protocol

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


MARKS = ("URL", "Error", "Page", "Did", "Goal", "Action")
"""The words that open the parts of a prompt."""

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


def turn_text(action: str) -> str:
    """What follows the page of a past turn."""
    return f"\nDid: {action}\n"


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

    def counts(self) -> tuple[int, ...]:
        return astuple(self)


class Past(Protocol):
    """What happened before a step of one episode, in tokens."""

    def prompt(
        self, before: list[int], page: list[int], goal: list[int], after: list[int], room: int, cuts: Cuts
    ) -> list[int] | None:
        """The next step's, of at most `room` tokens; None if goal and newest action alone do not fit."""
        ...

    def add(self, page: list[int], action: list[int]) -> None:
        """The step that was last asked for is over."""
        ...


class Actions:
    """The last `history` actions."""

    def __init__(self, history: int) -> None:
        self.history = history
        self.lines: list[list[int]] = []

    def prompt(
        self, before: list[int], page: list[int], goal: list[int], after: list[int], room: int, cuts: Cuts
    ) -> list[int] | None:
        shown = self.lines[-self.history :] if self.history else []
        return assemble(before, shown, page, goal, after, room, cuts)

    def add(self, page: list[int], action: list[int]) -> None:
        self.lines.append(action)


class Turns:
    """Whole turns, page and action.

    Where they no longer fit, the oldest are dropped until prompt and page fill half the room: were they dropped one by
    one, no prompt would begin like the one before it. Of the last turn dropped the action stays, so that the newest
    action is there even if no turn is.
    """

    def __init__(self) -> None:
        self.turns: list[tuple[list[int], list[int]]] = []
        self.first = 0

    def prompt(
        self, before: list[int], page: list[int], goal: list[int], after: list[int], room: int, cuts: Cuts
    ) -> list[int] | None:
        fixed = len(before) + len(page) + len(goal) + len(after)
        if fixed + self._length() > room:
            while self.first < len(self.turns) and fixed + self._length() > room // 2:
                self.first += 1
        cuts.histories += self.first > 0
        return assemble(before, [self._shown()], page, goal, after, room, cuts)

    def _length(self) -> int:
        return len(self._dropped()) + sum(len(page) + len(action) for page, action in self.turns[self.first :])

    def _dropped(self) -> list[int]:
        return self.turns[self.first - 1][1] if self.first else []

    def _shown(self) -> list[int]:
        out = list(self._dropped())
        for page, action in self.turns[self.first :]:
            out += page
            out += action
        return out

    def add(self, page: list[int], action: list[int]) -> None:
        self.turns.append((page, action))


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

"""WebShop sessions of people: the page visits that the shop's server logs, one file for each session.

A line is a visit: ``page`` (index, search_results, item_page, item_sub_page, done), ``url``, ``goal``, ``content``
and, on the page ``done``, ``reward`` and ``reward_info``. Actions are not logged. Each is inferred from two visits
that follow each other, and stands in the words that the shop's text mode uses (flag ``inferred_actions``):

- to search_results with other words or from index: ``search[words]``; a page more or less: ``click[Next >]``,
  ``click[< Prev]``, and ``click[< Prev]`` from an item
- to index: ``click[Back to Search]``
- to item_page from results: ``click[ASIN]``; of the same item with another option: ``click[value]``; from a subpage:
  ``click[< Prev]``
- to item_sub_page: ``click[Description]``, or whichever the URL names
- to done: ``click[Buy Now]``

A pair that none of these explains (a typed URL, the browser's back button) gives ``goto[URL]``.

The pages themselves are not logged either: the observation is what the server wrote of the visit, as JSON without the
goal's hidden answer, its reward and its URL. The person was shown ``goal.instruction_text`` only; the rest of the goal
(asin, attributes, options, price) would give the answer away and is kept in the episode's ``extra``.

The reward of ``done`` goes to Buy Now, 0 to what came before; ``success`` is reward == 1. A session without ``done``
is unlabelled, its end unknown.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from offline_lm.logs import _files, _webshop
from offline_lm.logs._adapters import Sample, from_lines, give_outcome, need, numbered, take, to_json
from offline_lm.logs._records import Bad
from offline_lm.types import Episode, Rejected

SOURCE = "webshop_human"
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
MAX_VISITS = 10_000
_PAGES = frozenset({"index", "search_results", "item_page", "item_sub_page", "done"})

Visit = dict[str, Any]


def detect(sample: Sample) -> str | None:
    page = sample.value.get("page") if {"page", "url", "goal"} <= sample.keys else None
    return "page visits of a WebShop session" if isinstance(page, str) and page in _PAGES else None


def find(path: Path) -> Iterator[Path]:
    return _files.find(path, SUFFIXES)


def read(path: Path) -> Iterator[Episode | Rejected]:
    """Every session of a folder, or the one of a file.

    Raises UserError for a folder without sessions.
    """
    return map(_read_file, find(path))


def _read_file(path: Path) -> Episode | Rejected:
    return from_lines(SOURCE, path, _check, lambda visits, sha256: _episode(visits, path, sha256), MAX_VISITS)


def _check(visit: Any, number: int) -> None:
    here = f"visit {number}"
    if need(visit, "page", str, here) not in _PAGES:
        raise Bad("bad_value", f"{here}.page is {visit['page'][:40]!r}; it must be one of {sorted(_PAGES)}")
    need(visit, "url", str, here)


def _episode(visits: list[Visit], path: Path, sha256: str) -> Episode:
    steps: list[dict[str, Any]] = []
    for i, (visit, after) in enumerate(pairwise(visits)):
        if visit["page"] == "done":
            raise Bad("steps_after_end", f"visit {i} is the end (done), yet visits follow; split the file")
        steps.append(_seen(visit, i) | _webshop.action_fields(_action(visit, after, i)))
    last = visits[-1]
    done = last["page"] == "done"
    if not steps:
        raise Bad("no_steps", "the session is a single visit, so nothing was done; leave the file out")
    reward = take(last, "reward", float, "done") if done else None
    give_outcome(steps, reward)
    if reward is not None:
        for step in steps:
            step["reward_source"] = "env"
    steps[-1] |= {"terminated": True if done else None, "truncated": False if done else None}
    steps.append(_seen(last, len(visits) - 1) | {"is_final_observation": True})
    goal = take(visits[0], "goal", dict, "visit 0") or {}
    name = path.name.split(".")[0]
    asin = take(goal, "asin", str, "goal")
    return Episode(
        source=SOURCE,
        native_id=name,
        dataset=path.parent.name or None,
        steps=numbered(steps),
        benchmark="webshop",
        task_id=f"webshop/{asin}" if asin else None,
        task_family=take(goal, "category", str, "goal"),
        site="webshop",
        start_url=visits[0]["url"],
        goal=take(goal, "instruction_text", str, "goal"),
        policy_id="human",
        policy_kind="human",
        outcome_reward=reward,
        raw_reward=reward,
        success=None if reward is None else reward == 1,
        terminated=True if done else None,
        truncated=False if done else None,
        end_reason="env_done" if done else "unknown",
        uri=str(path),
        sha256=sha256,
        quality_flags=("inferred_actions",) if reward is not None else ("inferred_actions", "unlabelled"),
        extra={"goal": goal, "reward_info": last.get("reward_info")},
    )


def _seen(visit: Visit, i: int) -> dict[str, Any]:
    content = take(visit, "content", dict, f"visit {i}")
    return {
        "url": visit["url"],
        "observation": to_json({"page": visit["page"], "content": content}),
        "observation_kind": "text",
        "source_offset": visit["offset"],
    }


# --- from two visits to the action between them ------------------------------------------------------------


def _action(before: Visit, after: Visit, i: int) -> str:
    page, to = before["page"], after["page"]
    here, there = _content(before, i), _content(after, i + 1)
    same_item = here.get("asin") == there.get("asin")
    if to == "index":
        return "click[Back to Search]"
    if to == "search_results":
        if page == "index" or (page == "search_results" and here.get("keywords") != there.get("keywords")):
            return f"search[{_words(there.get('keywords'))}]"
        if page == "search_results":
            turn = _number(there.get("page")) - _number(here.get("page"))
            return {1: "click[Next >]", -1: "click[< Prev]"}.get(turn, _goto(after))
        return "click[< Prev]" if page == "item_page" else _goto(after)
    if to == "item_page" and page == "search_results":
        return f"click[{there.get('asin')}]"
    if to == "item_page" and page == "item_sub_page" and same_item:
        return "click[< Prev]"
    if to == "item_page" and page == "item_page" and same_item:
        old, new = (take(content, "options", dict, f"visit {i}") or {} for content in (here, there))
        changed = [value for key, value in new.items() if old.get(key) != value]
        return f"click[{changed[0]}]" if len(changed) == 1 else _goto(after)
    if to == "item_sub_page" and page in ("item_page", "item_sub_page") and same_item:
        parts = unquote(after["url"]).split("/")
        return f"click[{parts[-2]}]" if len(parts) > 2 else _goto(after)
    if to == "done" and page in ("item_page", "item_sub_page") and same_item:
        return _webshop.BUY
    return _goto(after)


def _content(visit: Visit, i: int) -> dict[str, Any]:
    return take(visit, "content", dict, f"visit {i}") or {}


def _goto(visit: Visit) -> str:
    return f"goto[{visit['url']}]"


def _words(keywords: Any) -> str:
    return " ".join(map(str, keywords)) if type(keywords) is list else str(keywords)


def _number(page: Any) -> int:
    """The number of a results page, which the server writes as a number or as text."""
    text = str(page)
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0

"""NNetNav rows (WebArena's prompt): a row is one step, and the rows of an episode follow each other.

``prompt`` and ``output`` are the whole text with Llama 3's markers, and ``messages`` the same as messages. The prompt
of the user says ``OBSERVATION:``, ``URL:``, ``OBJECTIVE:`` and ``PREVIOUS ACTIONS:``; these become observation, url,
goal and a note. The constant system prompt is kept once, on the episode.
"""

from __future__ import annotations

import re
from typing import Any

from offline_lm.logs import _template
from offline_lm.logs._adapters import need
from offline_lm.logs._chat import split
from offline_lm.logs._records import Bad

_USER = re.compile(
    r"\A\s*OBSERVATION:\n(?P<page>.*)\nURL: (?P<url>[^\n]*)\nOBJECTIVE: (?P<goal>.*?)"
    r"(?:\nPREVIOUS ACTIONS?:\s*(?P<past>.*))?\Z",
    re.DOTALL,
)


def is_row(row: dict[str, Any]) -> bool:
    prompt, output = row.get("prompt"), row.get("output")
    return type(prompt) is str and type(output) is str and prompt.startswith("<|begin_of_text|>")


def episode_of(row: dict[str, Any]) -> tuple[str, str]:
    """(dataset, id) of the episode that a row belongs to."""
    name = "id" if row.get("id") is not None else "task_name"
    dataset = row.get("dataset")
    return dataset if type(dataset) is str else "", need(row, name, str)


def step(row: dict[str, Any]) -> tuple[dict[str, Any], str | None, str | None]:
    """(fields of the step, goal, system prompt) of a row. Raises Bad if its text is no rendered prompt."""
    text = need(row, "prompt", str) + need(row, "output", str)
    turns = _template.messages(text)
    if not turns or turns[-1]["role"] != "assistant":
        raise Bad("bad_value", "prompt and output are no text of Llama 3's template that ends with the assistant")
    (made,) = split(turns, "prompt", range(len(turns) - 1))
    system = next((turn["content"] for turn in turns if turn["role"] == "system"), None)
    user = next((turn["content"] for turn in reversed(turns) if turn["role"] == "user"), "")
    if (found := _USER.match(user)) is None:
        return made, None, None
    made |= {"observation": found["page"], "observation_kind": "axtree", "url": found["url"]}
    del made["messages"]
    if found["past"]:
        made["extra"] = {"previous_actions": found["past"].strip()}
    known = ("prompt", "output", "messages", "dataset", "id", "task_name")
    if other := {key: item for key, item in row.items() if key not in known and item is not None}:
        made["extra"] = made.get("extra", {}) | other
    arguments = made.get("action_args", {}).get("arguments")
    if arguments and made["action_name"] in ("click", "type", "hover"):
        made["target"] = {"ref": arguments[0]}
    return made, found["goal"].strip(), system

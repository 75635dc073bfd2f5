"""What browser-use's logs have in common: the model's output as commands, prompts, and the items of a history."""

from __future__ import annotations

import re
from contextlib import suppress
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

from offline_lm.logs import _media
from offline_lm.logs._adapters import call_text, take, to_json
from offline_lm.logs._records import Bad, parse

SOURCE = "browser_use"
Call = tuple[str, Any]
_shown = itemgetter("text", "depth", "is_text_only", "index")
"""What a page says of an item."""

_BRAIN = ("thinking", "evaluation_previous_goal", "valuation_previous_goal", "memory", "next_goal", "goal")
_GOALS = (
    ("<user_request>", "</user_request>"),
    ('Your ultimate task is: """', '"""'),
    ('Your ultimate task is: "', '". If'),
    ("Your task is:", "\n"),
)


# --- the model's output -------------------------------------------------------------------------------------


def decision(output: dict[str, Any], response: str, place: str) -> tuple[dict[str, Any], list[Call]]:
    """(fields of the step, its calls) of an output; calls are in ``{name: params}``, once in action and params."""
    brain = take(output, "current_state", dict, place) or output
    told = [take(brain, key, str, place) for key in _BRAIN]
    calls = _calls(output, place)
    texts = [call_text(name, params) for name, params in calls]
    step: dict[str, Any] = {
        "response": response,
        "thought": "\n".join(text for text in told if text) or None,
        "action": "; ".join(texts),
        "action_grammar": SOURCE,
    }
    if not calls:
        return step | {"action_valid": False}, calls
    name, params = calls[0]
    step |= {"action_name": name, "action_args": params if type(params) is dict else {"value": params}}
    if type(params) is dict and type(index := params.get("index", params.get("id"))) is int:
        step["target"] = {"ref": str(index)}
    if len(texts) > 1:
        step["sub_actions"] = tuple(texts)
    return step, calls


def _calls(output: dict[str, Any], place: str) -> list[Call]:
    given = output.get("action")
    if type(given) is str:
        params = take(output, "params", dict, place) or {}
        return [(given, {key: item for key, item in params.items() if item is not None})]
    if given is None or type(given) is dict:
        given = [given] if given else []
    if type(given) is not list:
        raise Bad("wrong_type", f"{place}.action must be a list of objects, one for each action")
    calls: list[Call] = []
    for i, item in enumerate(given):
        if type(item) is not dict:
            raise Bad("wrong_type", f"{place}.action[{i}] must be an object, the name of the action its key")
        chosen = {name: params for name, params in item.items() if params is not None}
        calls += (chosen or (item if len(item) == 1 else {})).items()
    return calls


def reply(text: str | None) -> tuple[dict[str, Any], list[Call]]:
    """As `decision`, of the text that the model wrote, which may be no JSON."""
    failed: dict[str, Any] = {"response": text, "action": "" if text is None else None, "action_valid": False}
    with suppress(Bad):
        if type(output := parse((text or "").encode())) is dict:
            return decision(output, text or "", "output")
    return failed | {"action_grammar": SOURCE}, []


def done(calls: list[Call]) -> dict[str, Any]:
    """What the last step's call of ``done`` says of the episode."""
    for name, params in calls:
        if name == "done":
            said = params if type(params) is dict else {}
            answer, success = said.get("text"), said.get("success")
            return {
                **end(True, False, "agent_stop"),
                "final_answer": answer if type(answer) is str else None,
                "self_reported_success": success if type(success) is bool else None,
            }
    return end(None, None, "unknown")


def end(terminated: bool | None, truncated: bool | None, reason: str) -> dict[str, Any]:
    return {"terminated": terminated, "truncated": truncated, "end_reason": reason}


# --- what the agent saw -------------------------------------------------------------------------------------


def goal_of(text: str) -> str | None:
    """The task, as the prompts of each version say it."""
    for before, after in _GOALS:
        _, found, rest = text.partition(before)
        if found:
            return rest.partition(after)[0].strip()
    return None


def place_of(text: str) -> dict[str, Any]:
    """url and title, as prompts say them."""
    if tab := re.search(r"^Current tab: (\S+)$", text, re.MULTILINE):
        known = re.search(rf"^Tab {re.escape(tab[1])}: (\S+)(?: - (.*))?$", text, re.MULTILINE)
        return {"url": known[1], "title": known[2]} if known else {}
    if url := re.search(r"^Current url: (\S+)", text, re.MULTILINE):
        return {"url": url[1]}
    _, found, visited = text.rpartition("Url history: ['")
    return {"url": visited.partition("']")[0].rpartition("'")[2]} if found else {}


# --- an item of a history -----------------------------------------------------------------------------------


def history_item(item: Any, place: str, path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(fields of the step, its results)"""
    output = take(item, "model_output", dict, place)
    state = take(item, "state", dict, place) or {}
    metadata = take(item, "metadata", dict, place) or {}
    step: dict[str, Any] = {"action": "", "action_valid": False, "action_grammar": SOURCE}
    if output:
        step, _ = decision(output, to_json(output), f"{place}.model_output")
    given = item.get("result")
    results = [given] if type(given) is dict else take(item, "result", list, place) or []
    errors = [take(result, "error", str, f"{place}.result[{i}]") for i, result in enumerate(results)]
    elements = take(state, "interacted_element", list, f"{place}.state") or []
    if element := next((e for e in elements if type(e) is dict), None):
        step["target"] = step.get("target", {}) | _element(element)
    prompt = take(item, "state_message", str, place)
    kept = {key: v for key, v in state.items() if key not in ("url", "title", "screenshot", "items")}
    step |= {
        "url": take(state, "url", str, f"{place}.state"),
        "title": take(state, "title", str, f"{place}.state"),
        "screenshot": _screenshot(state, f"{place}.state", path.parent),
        "action_error": "\n".join(error for error in errors if error) or None,
        "ts_start": _time(metadata, "step_start_time", f"{place}.metadata"),
        "ts_end": _time(metadata, "step_end_time", f"{place}.metadata"),
        "extra": kept | {"result": [_without_images(result, place) for result in results], "metadata": metadata},
        "unseen": not prompt and "items" not in state,
    }
    if prompt:
        step |= {"observation": prompt, "observation_kind": "text"}
    elif "items" in state:
        step |= {"observation": _page(state, f"{place}.state"), "observation_kind": "dom"}
    else:
        tabs = [take(tab, "url", str, f"{place}.state.tabs") for tab in take(state, "tabs", list, place) or []]
        lines = [f"url: {step['url']}", f"title: {step['title']}", *[f"tab: {tab}" for tab in tabs]]
        step |= {"observation": "\n".join(lines), "observation_kind": "text"}
    return step, results


def _page(state: dict[str, Any], place: str) -> str:
    """A line for each item, indented by depth; those that can be acted on begin with their index."""
    lines = []
    for i, item in enumerate(take(state, "items", list, place) or []):
        try:
            text, depth, text_only, index = _shown(item)
        except (KeyError, TypeError):  # one is not logged, or the item is no object
            text = depth = text_only = index = None
        if type(text) is not str or type(depth) is not int or type(text_only) is not bool or type(index) is not int:
            here = f"{place}.items[{i}]"
            text, depth = take(item, "text", str, here) or "", take(item, "depth", int, here) or 0
            text_only = take(item, "is_text_only", bool, here)
            index = None if text_only else take(item, "index", int, here)
        mark = "" if text_only else f"[{index}] "
        lines.append("  " * min(depth, 64) + mark + text)
    return "\n".join(lines)


def _screenshot(state: dict[str, Any], place: str, folder: Path) -> dict[str, Any] | None:
    if inline := take(state, "screenshot", str, place):
        return _media.of_base64(inline)
    if named := take(state, "screenshot_path", str, place):
        name = re.split(r"[/\\]", named)[-1].replace("\0", "") or "."
        found = _media.of_file(folder / name)
        return found if found["status"] != "missing" else _media.of_file(folder / "screenshots" / name)
    return None


def _element(element: dict[str, Any]) -> dict[str, Any]:
    attributes = element.get("attributes")
    role = attributes.get("role") if type(attributes) is dict else None
    target = {"tag": element.get("node_name", element.get("tag_name")), "role": role, "text": element.get("ax_name")}
    return {key: item for key, item in target.items() if type(item) is str}


def _without_images(result: dict[str, Any], place: str) -> dict[str, Any]:
    images = [image for image in take(result, "images", list, place) or () if type(image) is dict]
    kept = {key: item for key, item in result.items() if key not in ("images", "judgement")}
    if images:
        data = [image.get("data") for image in images]
        hashes = [_media.of_base64(item)["sha256"] if type(item) is str else None for item in data]
        kept["images"] = [
            {"name": image.get("name"), "sha256": sha256} for image, sha256 in zip(images, hashes, strict=True)
        ]
    return kept


def _time(metadata: dict[str, Any], key: str, place: str) -> datetime | None:
    seconds = take(metadata, key, float, place)
    try:
        return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        raise Bad("out_of_range", f"{place}.{key} is no time in seconds since 1970") from None

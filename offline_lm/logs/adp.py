"""Agent Data Protocol (Song et al. 2025, arXiv 2510.24702): ``{id, content[], details}``, one object for each episode.

The schema is ``schema/`` of the project's repository (neulab/agent-data-protocol); ``sample_std.json`` and
``full_std.jsonl`` hold it, ``sample_raw.json`` beside them are the source data sets in formats of their own.

``content`` mixes observations and actions, told apart by ``class_``. All observations since the last action make what
the agent saw; each action is a step.

- A ``web_observation`` is the page: its axtree, else its html. `webarena_successful` puts the axtree into ``html``:
  what is no markup is read as an axtree (``extra.web.field`` says where it stood). Of several pages in a row the last
  counts, the others stand in ``extra.earlier``. Texts beside a page go to ``messages``.
- The user's text before the first action is the goal, and where nothing else was shown, the observation as well.
- A lone ``text_observation`` is the observation; several are ``messages``.
- ``image_observation``: a screenshot, by its file beside the log (``screenshots/NAME``) or in base64.
- An action right after another action saw nothing new: its observation is empty, flag ``missing_observations``.
- ``api_action`` is ``function(key=value)``; some data sets quote string arguments a second time (``'"149"'``): they
  are unquoted, and ``extra.quoted`` names them. ``code_action`` and ``message_action`` are their content.
  ``description`` is the thought. The raw response was not kept.
- The converters wrap the last message as ``<finish> answer </finish>``: it stays in the action, and the answer is the
  ``final_answer``. It marks where the log ends, not why, so ``terminated`` stays null.

There is no reward, no end, no model and no time: every episode is flagged ``unlabelled``. Ids repeat in some data sets
(there they name the task): other content under an id that was seen gets ``ID#SHA256``, the same content the same name,
so the store counts it as a duplicate.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

from offline_lm.logs import _files, _media
from offline_lm.logs._adapters import Sample, call_text, each, need, numbered, take, to_json
from offline_lm.logs._files import Record
from offline_lm.logs._records import Bad, parse
from offline_lm.types import JSON, Episode, Rejected, Step

SOURCE = "adp"
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".jsonl.zst")
ACTIONS = frozenset({"api_action", "code_action", "message_action"})
OBSERVATIONS = frozenset({"text_observation", "image_observation", "web_observation"})
MAX_NAME = 255
"""Bytes in the name of a file; the system refuses to look for a longer one."""
ENVIRONMENT = "environment"
"""The source of a text that names none."""
_TAG = re.compile(r"<(?:[a-zA-Z][\w-]*[\s/>]|!DOCTYPE|!--)")
_FINISH = re.compile(r"\A\s*<finish>(.*)</finish>\s*\Z", re.DOTALL)


def detect(sample: Sample) -> str | None:
    content = sample.value.get("content") if {"id", "content"} <= sample.keys else None
    if type(content) is list and content and type(content[0]) is dict:
        kind = content[0].get("class_")
        if type(kind) is str and kind in ACTIONS | OBSERVATIONS:
            return "content[] of classes of the Agent Data Protocol"
    return None


def find(path: Path) -> Iterator[Path]:
    return (file for file in _files.find(path, SUFFIXES) if file == path or not file.name.startswith("sample_raw."))


def read(path: Path) -> Iterator[Episode | Rejected]:
    """Every trajectory of a file, or of the files ending in `SUFFIXES` under a folder but ``sample_raw.json``.

    Raises UserError for a folder without such files.
    """
    return chain.from_iterable(map(_read_file, find(path)))


def _read_file(path: Path) -> Iterator[Episode | Rejected]:
    stem = path.name.split(".")[0]
    dataset = path.parent.name if stem.endswith("_std") or stem == "std" else stem
    first: dict[str, str] = {}  # id -> hash of the row that bears it unchanged

    def to_episode(value: Any, record: Record) -> Episode:
        episode = episode_of(value, path, dataset)
        name = episode.native_id
        if first.setdefault(name, record.sha256[:12]) != record.sha256[:12]:
            name = f"{name}#{record.sha256[:12]}"
        return replace(episode, native_id=name, sha256=record.sha256)

    return each(SOURCE, path, to_episode)


# --- reading ------------------------------------------------------------------------------------------------


def episode_of(row: Any, path: Path, dataset: str | None = None) -> Episode:
    """The episode that a row of the protocol says. Raises Bad."""
    if type(row) is not dict:
        raise Bad("not_an_object", "not a JSON object; a trajectory has id, content and details")
    native_id = str(need(row, "id", (str, int)))
    goal = answer = None
    steps: list[JSON] = []
    seen: list[JSON] = []
    flags = ["unlabelled"]
    for i, item in enumerate(need(row, "content", list)):
        place = f"content[{i}]"
        kind = need(item, "class_", str, place)
        if kind in OBSERVATIONS:
            seen.append(item | {"place": place})
        elif kind in ACTIONS:
            if not seen:
                flags.append("missing_observations")
            elif not steps:
                goal, seen = _goal(seen)
            steps.append(_merge(_saw(seen, path), _did(item, kind, place)))
            seen = []
        else:
            known = ", ".join(sorted(ACTIONS | OBSERVATIONS))
            raise Bad("bad_value", f"{place}.class_ is {kind[:40]!r}; it must be one of: {known}")
    if steps and (finish := _FINISH.match(steps[-1]["action"])):
        answer = finish[1].strip()
    if steps and seen:
        steps.append(_saw(seen, path) | {"is_final_observation": True})
    details = take(row, "details", dict)
    return Episode(
        source=SOURCE,
        native_id=native_id,
        dataset=dataset,
        task_id=native_id,
        steps=numbered(steps),
        goal=goal,
        start_url=next((step["url"] for step in steps if step.get("url")), None),
        final_answer=answer,
        uri=str(path),
        quality_flags=tuple(dict.fromkeys(flags)),
        extra={"details": details} if details else {},
    )


def _goal(seen: list[JSON]) -> tuple[str | None, list[JSON]]:
    """(the first text of the user, what was seen beside it): alone it is the observation as well."""
    for i, item in enumerate(seen):
        if item["class_"] == "text_observation" and item.get("source") == "user":
            rest = seen[:i] + seen[i + 1 :]
            alone = not rest or i > 0 or item.get("name") is not None
            return need(item, "content", str, item["place"]), seen if alone else rest
    return None, seen


def _merge(saw: JSON, did: JSON) -> JSON:
    extra = saw.pop("extra", {}) | did.pop("extra", {})
    return saw | did | ({"extra": extra} if extra else {})


def _saw(seen: list[JSON], path: Path) -> JSON:
    """Step fields of the observations between two actions."""
    texts = [item for item in seen if item["class_"] == "text_observation"]
    pages = [item for item in seen if item["class_"] == "web_observation"]
    images = [item for item in seen if item["class_"] == "image_observation"]
    step: JSON = {"observation": "", "observation_kind": "text"}
    extra: JSON = {}
    if pages:
        step, extra["web"] = _page(pages[-1], path)
        extra |= {"earlier": [_as_logged(page) for page in pages[:-1]]} if len(pages) > 1 else {}
    if len(texts) == 1 and not pages:
        text = texts[0]
        step["observation"] = need(text, "content", str, text["place"])
        source, name = take(text, "source", str, text["place"]), take(text, "name", str, text["place"])
        if (source or ENVIRONMENT) != ENVIRONMENT or name is not None:
            extra["text"] = {"source": source or ENVIRONMENT, "name": name}
    elif texts:
        said = [
            {"role": take(text, "source", str, text["place"]) or ENVIRONMENT}
            | ({"name": text["name"]} if text.get("name") is not None else {})
            | {"content": need(text, "content", str, text["place"])}
            for text in texts
        ]
        step["messages"] = to_json(said)
        if not pages:
            step |= {"observation": None, "observation_kind": "messages"}
    if images:
        extra["images"] = [_image(image, path, image["place"])[1] for image in images]
        step["screenshot"] = _image(images[-1], path, images[-1]["place"])[0]
    return step | ({"extra": extra} if extra else {})


def _page(item: JSON, path: Path) -> tuple[JSON, JSON]:
    place = item["place"]
    axtree, html = take(item, "axtree", str, place), take(item, "html", str, place)
    web: JSON = {"field": "axtree" if axtree is not None else "html"}
    text, kind = (axtree, "axtree") if axtree is not None else (html, "html")
    if text is not None and kind == "html" and not _TAG.search(text):
        kind = "axtree"
    if axtree is not None and html is not None:
        web["html"] = html
    if take(item, "viewport_size", list, place) is not None:
        web["viewport_size"] = item["viewport_size"]
    step: JSON = {"observation": text, "observation_kind": kind, "url": take(item, "url", str, place)}
    image = take(item, "image_observation", dict, place)
    if image is not None:
        step["screenshot"], web["image"] = _image(image, path, f"{place}.image_observation")
    if text is None:
        web["field"] = None
        if image is None:
            step |= {"observation": "", "observation_kind": "text"}
    return step, web


def _image(item: JSON, path: Path, place: str) -> tuple[JSON, JSON]:
    """(screenshot, what else the log says of it). Only files in ``screenshots`` beside the log are looked at."""
    content = need(item, "content", str, place)
    rest = {key: value for key, value in item.items() if key not in ("class_", "content", "place")}
    if content.startswith("data:") or len(content) > 1000:
        return _media.of_base64(content), rest
    name = Path(content).name
    if content.startswith(("http://", "https://")) or "\0" in name or not 0 < len(name.encode()) <= MAX_NAME:
        return _media.missing(), rest | {"content": content}
    return _media.of_file(path.parent / "screenshots" / name), rest | {"content": content}


def _as_logged(item: JSON) -> JSON:
    """A page that is kept beside the one that counts; its picture only by name."""
    kept = {key: value for key, value in item.items() if key != "place"}
    if type(image := kept.get("image_observation")) is dict and len(str(image.get("content"))) > 1000:
        kept["image_observation"] = None
    return kept


def _did(item: JSON, kind: str, place: str) -> JSON:
    step: JSON = {"thought": take(item, "description", str, place)}
    if kind == "api_action":
        name, kwargs = need(item, "function", str, place), take(item, "kwargs", dict, place) or {}
        args = {key: _unquoted(value) for key, value in kwargs.items()}
        step |= {"action": call_text(name, args), "action_name": name, "action_args": args, "action_grammar": "api"}
        if quoted := [key for key, value in kwargs.items() if args[key] != value]:
            step["extra"] = {"quoted": quoted}
    elif kind == "code_action":
        language = take(item, "language", str, place)
        step |= {"action": need(item, "content", str, place), "action_name": language, "action_grammar": "code"}
    else:
        step |= {"action": need(item, "content", str, place), "action_grammar": "message"}
    return step


def _unquoted(value: Any) -> Any:
    """The text of an argument that stands as a JSON string inside a string; anything else as it is."""
    if type(value) is str and len(value) > 1 and value[0] == value[-1] == '"':
        try:
            inner = parse(value.encode())
        except Bad:
            return value
        if to_json(inner) == value:
            return inner
    return value


# --- writing ------------------------------------------------------------------------------------------------

_OF_THE_FILE = frozenset({"source", "dataset", "uri", "sha256", "adapter_version", "quality_flags"})
"""What reading sets by where a row stood: not content, so never called lost."""


def write(episode: Episode) -> tuple[JSON, list[str]]:
    """The row of the protocol for an episode, and the names of the fields (``steps.reward``) that it cannot say.

    The names come from reading the row back and comparing, so whatever is not named is the same after reading.
    """
    content: list[JSON] = []
    for i, step in enumerate(episode.steps):
        seen = _observations(step)
        if i == 0 and episode.goal is not None:
            seen = _with_goal(seen, episode.goal)
        content += seen
        if not step.is_final_observation:
            content.append(_action(step))
    row = {"id": episode.native_id, "content": content, "details": episode.extra.get("details", {})}
    again = episode_of(row, Path())
    lost = [
        f.name
        for f in fields(Episode)
        if f.name not in _OF_THE_FILE | {"steps"} and getattr(episode, f.name) != getattr(again, f.name)
    ]
    if len(again.steps) != len(episode.steps):
        return row, [*lost, "steps"]
    pairs = list(zip(episode.steps, again.steps, strict=True))
    lost += [
        f"steps.{f.name}"
        for f in fields(Step)
        if any(_content(getattr(a, f.name)) != _content(getattr(b, f.name)) for a, b in pairs)
    ]
    return row, lost


def _content(value: Any) -> Any:
    """A picture's bytes and place are no content of a log."""
    if type(value) is dict and "status" in value and "mime" in value:
        return {key: value[key] for key in ("sha256", "mime", "status") if key in value}
    return value


def _observations(step: Step) -> list[JSON]:
    extra = step.extra or {}
    web = extra.get("web")
    items: list[JSON] = []
    if step.messages is not None:
        for said in parse(step.messages.encode(), refuse_duplicates=False):
            text = said["content"] if type(said.get("content")) is str else to_json(said.get("content"))
            items.append(_text(text, said.get("role"), said.get("name")))
    if web is not None or step.url is not None or step.observation_kind in ("axtree", "html", "dom"):
        web = web or {}
        field = web.get("field", "html" if step.observation_kind in ("html", "dom") else "axtree")
        page: JSON = {"class_": "web_observation", "html": web.get("html"), "axtree": None, "url": step.url}
        page |= {"image_observation": web.get("image"), "viewport_size": web.get("viewport_size")}
        if page["image_observation"] is not None:
            page["image_observation"] = {"class_": "image_observation", "content": ""} | page["image_observation"]
        if field is not None:
            page[field] = step.observation
        items += [*extra.get("earlier", []), page]
    elif step.observation is not None and (step.observation or "text" in extra):
        text = extra.get("text", {})
        items.append(_text(step.observation, text.get("source"), text.get("name")))
    items += [{"class_": "image_observation", "content": ""} | image for image in extra.get("images", [])]
    return items


def _with_goal(seen: list[JSON], goal: str) -> list[JSON]:
    """The goal before the first page, where it is not what was seen."""
    shown = len(seen) == 1 and seen[0]["class_"] == "text_observation" and seen[0]["content"] == goal
    named = [item for item in seen if item.get("source") == "user" and item.get("name") is not None]
    return seen if (shown and seen[0]["source"] == "user") or named else [_text(goal, "user", None), *seen]


def _text(content: str, source: str | None, name: str | None) -> JSON:
    return {"class_": "text_observation", "content": content, "name": name, "source": source or ENVIRONMENT}


def _action(step: Step) -> JSON:
    """An API call where the command is one, code where it says so, else a message with the command as its text."""
    action = step.action if step.action is not None else step.response
    name, args = step.action_name, step.action_args
    if name is not None and args is not None and call_text(name, args) == action:
        quoted = (step.extra or {}).get("quoted", [])
        kwargs = {key: _quoted(value, key in quoted) for key, value in args.items()}
        return {"class_": "api_action", "function": name, "kwargs": kwargs, "description": step.thought}
    if step.action_grammar == "code":
        return {"class_": "code_action", "language": name, "content": action, "description": step.thought}
    return {"class_": "message_action", "content": action, "description": step.thought}


def _quoted(value: Any, quoted: bool) -> Any:
    """Text that would be unquoted when it is read is quoted once more."""
    return to_json(value) if quoted or _unquoted(value) != value else value

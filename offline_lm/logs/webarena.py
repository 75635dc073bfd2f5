"""WebArena and VisualWebArena result folders, as ``run.py`` and its ``RenderHelper`` write them.

``render_ID.html`` (the trajectory), ``merged_log.txt`` or the log files that ``log_files.txt`` names (PASS or FAIL),
``config.json`` (the arguments of the run), ``error.txt``, and ``traces/ID.zip``, which is not read here.

- The page's text and the model's output stand in the HTML unescaped, and ``div.state_obv`` is closed by ``<div>``: no
  HTML parser can read it. The renderer's own literal markup is searched instead. Text that holds ``</pre>`` does no
  harm; where text holds that whole markup, the place of its end cannot be told and the file is refused
  (``ambiguous_markup``). A page with ``</body>`` made the renderer cut the file there: ``damaged_render``.
- A decision is a block: url, observation, screenshot (base64), the description of the action before, the raw
  prediction (the response) and the parsed action. The action is what stands between the first pair of ``` in the
  response, as WebArena takes it (``click [12]``, ``type [12] [text] [1]``, ``stop [answer]``); a parsed action of
  ``none`` was no valid action. Runs with the playwright action set have code there and no response.
- ``stop [Early stop: ...]`` and ``stop [ERROR: ...]`` without a response are the harness's own: that block is the
  final observation. Early stops truncate (``step_limit`` for the maximum of steps).
- Only the log has the outcome; it is the reward of the last action. A log holds several runs, and a task may be run
  again: the last start of a task counts, and has no outcome if the log has none after it. No log or no result:
  unlabelled. The log's clock, whose zone is not said, is taken as UTC.
- Task numbers of VisualWebArena begin anew at each site, so its ``task_id`` has the site.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

from offline_lm.logs import _files, _media
from offline_lm.logs._adapters import Sample, contents, give_outcome, numbered, rejected
from offline_lm.logs._files import Damaged, lines
from offline_lm.logs._records import Bad, parse
from offline_lm.types import Episode, Rejected

SOURCE = "webarena"
_RENDER = re.compile(r"render_(.{1,200})\.html\Z")
_LOG = re.compile(r".+\.log\Z")
MAX_HTML = 256 << 20
MAX_CONFIG = 1 << 20


def detect(sample: Sample) -> str | None:
    if sample.is_dir:
        return "render_ID.html" if any(map(_RENDER.match, sample.names)) else None
    return "a rendered trajectory" if _RENDER.match(sample.name) and b"<div class='state_obv'>" in sample.head else None


def find(path: Path) -> Iterator[Path]:
    if path.is_file():
        return iter((path,))
    return _files.find_folders(
        path, lambda folder: any(_RENDER.match(p.name) for p in folder.iterdir()), "folder with render_ID.html"
    )


def read(path: Path, *, dataset: str | None = None, model: str | None = None) -> Iterator[Episode | Rejected]:
    """One Episode or Rejected for each render_ID.html of the result folders at or below `path`, or of that one file.

    `dataset` names the collection (default: the folder, which is ``policy_id`` too); `model` is the language model
    where ``config.json`` is missing.
    """
    return chain.from_iterable(_read_folder(part, dataset, model) for part in find(path))


def _read_folder(part: Path, dataset: str | None, model: str | None) -> Iterator[Episode | Rejected]:
    folder = part.parent if part.is_file() else part
    files = [part] if part.is_file() else _named_like(_RENDER, part)
    run, outcomes = _arguments(folder), _outcomes(folder)
    for file in files:
        data = b""
        try:
            data = contents(file, MAX_HTML)
            fields = _episode(_text(data), run, outcomes)
        except Bad as bad:
            yield rejected(SOURCE, file, bad, 0, data)
            continue
        sampling = {k: run[k] for k in ("temperature", "top_p", "max_tokens") if type(run.get(k)) in (int, float)}
        yield Episode(
            source=SOURCE,
            dataset=dataset or folder.name or None,
            policy_id=folder.name or None,
            policy_kind="llm",
            model=run.get("model") or model,
            agent=run.get("agent_type"),
            sampling=sampling or None,
            uri=str(file),
            sha256=hashlib.sha256(data).hexdigest(),
            **fields,
        )


def _named_like(pattern: re.Pattern[str], folder: Path) -> list[Path]:
    return sorted((p for p in folder.iterdir() if pattern.match(p.name)), key=lambda p: p.name)


def _text(data: bytes) -> str:
    try:
        return data.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise Bad("invalid_utf8", f"byte {error.start} is not UTF-8; re-encode the file as UTF-8") from None


# --- what stands beside the trajectories --------------------------------------------------------------------


@dataclass(slots=True)
class _Outcome:
    """What the log says of the last run of a task."""

    started_at: datetime | None
    intent: str | None = None
    passed: bool | None = None
    error: str | None = None


_LINE = re.compile(
    r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d{3} - INFO - "
    r"(?:\[(Config file|Intent)\]: (.*)|\[Result\] \((PASS|FAIL)\) (.*)|\[(OpenAI Error|Unhandled Error)\] (.*))"
)


def _arguments(folder: Path) -> dict[str, Any]:
    """``config.json``; only what is used is checked. A broken one is as good as none: it says nothing of the steps."""
    file = folder / "config.json"
    try:
        value = parse(contents(file, MAX_CONFIG), refuse_duplicates=False) if file.is_file() else {}
    except Bad as bad:
        return {"config_error": bad.message}
    if type(value) is not dict:
        return {"config_error": "config.json holds no object"}
    texts = ("model", "agent_type", "observation_type", "action_set_tag")
    return {key: item for key, item in value.items() if key not in texts or type(item) is str}


def _outcomes(folder: Path) -> dict[str, _Outcome]:
    """The outcome of each task by the stem of its config file. Files are in order of time, by their names."""
    logs = [folder / "merged_log.txt"]
    if not logs[0].is_file():
        beside = folder / "log_files"
        logs = _named_like(_LOG, folder) + (_named_like(_LOG, beside) if beside.is_dir() else [])
    runs: dict[str, _Outcome] = {}
    for file in logs:
        if file.is_file():
            _read_log(file, runs)
    return runs


def _read_log(path: Path, runs: dict[str, _Outcome]) -> None:
    current: _Outcome | None = None
    for line in lines(path):
        match = None if isinstance(line, Damaged) else _LINE.match(line.data.decode("utf-8", "replace"))
        if match is None:
            continue
        at, field, value, verdict, file, kind, why = match.groups()
        if field == "Config file":
            current = runs[_stem(value)] = _Outcome(_time(at))
        elif field == "Intent" and current:
            current.intent = value.strip()
        elif verdict:
            runs.setdefault(_stem(file), _Outcome(None)).passed = verdict == "PASS"
        elif kind and current:
            current.error = f"[{kind}] {why.strip()}"[:1000]


def _stem(path: str) -> str:
    return path.strip().replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".json")


def _time(text: str) -> datetime | None:
    try:
        return datetime.strptime(text, "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC)
    except ValueError:
        return None


# --- the renderer's markup ----------------------------------------------------------------------------------

_BODY, _BODY_END = "<body>\n", "</body>\n</html>"
_CONFIG, _CONFIG_END = "<pre>", "</pre>\n"
_BLOCK = "<h2>New Page</h2>\n<h3 class='url'><a href="
_URL, _URL_END = ">URL: ", "</a></h3>\n<div class='state_obv'><pre>"
_PAGE_END = "</pre><div>\n"
_IMAGE, _IMAGE_END = "<img src='data:image/png;base64,", "' style='width:50vw; height:auto;'/>\n"
_BEFORE = "<div class='prev_action' style='background-color:pink'>"
_PREDICTED = "</div>\n<div class='predict_action'>"
_RAW = "<div class='raw_parsed_prediction' style='background-color:grey'><pre>"
_OBJECT = "</pre></div><div class='action_object' style='background-color:grey'><pre>"
_PARSED = "</pre></div><div class='parsed_action' style='background-color:yellow'><pre>"
_PARSED_END = "</pre></div></div>"
_CODE_END = "</div>"


@dataclass(frozen=True, slots=True)
class _Block:
    url: str
    page: str
    image: str | None
    before: str
    """the description of the action before, as it went into the prompt"""
    response: str | None
    parsed: str


def _cut(text: str, mark: str, place: str) -> tuple[str, str]:
    """(before, after) the only occurrence of `mark`."""
    head, found, tail = text.partition(mark)
    if not found:
        raise Bad("damaged_render", f"{place}: {mark!r} is missing; was the file cut, or did a page hold </body>?")
    if mark in tail:
        raise Bad("ambiguous_markup", f"{place}: {mark!r} is there twice, once in the text of the page or the model")
    return head, tail


def _blocks(html: str) -> tuple[str, list[_Block]]:
    """(the task's config, the decisions) of a rendered file."""
    _, found, body = html.partition(_BODY)
    body, closed, _ = body.rpartition(_BODY_END)
    if not found or not closed:
        raise Bad("damaged_render", "the file does not begin and end as the renderer writes it; was it cut?")
    head, *parts = body.split(_BLOCK)
    config = head.strip()
    if not (config.startswith(_CONFIG) and config.endswith(_CONFIG_END.strip())):
        raise Bad("damaged_render", "the task's config does not stand before the first page; was the file cut?")
    return config[len(_CONFIG) : -len(_CONFIG_END.strip())], [_block(p, f"page {i}") for i, p in enumerate(parts)]


def _block(text: str, place: str) -> _Block:
    head, rest = _cut(text, _URL_END, place)
    url = head[(len(head) - len(_URL)) // 2 + len(_URL) :]
    if head != f"{url}{_URL}{url}":
        raise Bad("damaged_render", f"{place}: the url does not stand there twice; was the file cut?")
    rest, action = _cut(rest, _PREDICTED, place)
    rest, before = _cut(rest, _BEFORE, place)
    page, image = _cut(rest, _PAGE_END, place)
    if image:
        if not (image.startswith(_IMAGE) and image.endswith(_IMAGE_END)):
            raise Bad("damaged_render", f"{place}: between the page and the action before stands more than a picture")
        image = image[len(_IMAGE) : -len(_IMAGE_END)]
    action = action.rstrip()
    if not action.startswith(_RAW):
        if not action.endswith(_CODE_END):
            raise Bad("damaged_render", f"{place}: the action is not closed; was the file cut?")
        return _Block(url, page, image or None, before, None, action[: -len(_CODE_END)])
    raw, rest = _cut(action[len(_RAW) :], _OBJECT, place)
    _, parsed = _cut(rest, _PARSED, place)
    if not parsed.endswith(_PARSED_END):
        raise Bad("damaged_render", f"{place}: the parsed action is not closed; was the file cut?")
    return _Block(url, page, image or None, before, raw, parsed[: -len(_PARSED_END)])


# --- episodes -----------------------------------------------------------------------------------------------

_KEY = re.compile(r"([a-z_]{1,40}): (.*)")
_SITE = re.compile(r"'([a-z_]{1,40})'")
_COMMAND = re.compile(r"([a-z_]{1,40})\s*(?:\[(.*)\])?\s*\Z", re.DOTALL)
_TYPED = re.compile(r"(\d{1,9})\] ?\[(.*)\Z", re.DOTALL)
_ARGS = {"click": "id", "hover": "id", "scroll": "direction", "press": "keys", "goto": "url", "stop": "answer"}
_ARGS |= {"tab_focus": "tab", "page_focus": "tab"}
_FENCE = "```"
_NOT_FOUND = "Attempt to perfom"  # the writer's spelling
_HARNESS = {
    "stop [Early stop: Reach max steps": "step_limit",
    "stop [Early stop: Get a numeric reward": "env_done",  # of the fork that also runs MiniWoB
    "stop [Early stop:": "agent_error",
}


def _config(text: str) -> dict[str, str]:
    """``key: value`` lines; a value may run over several."""
    values: dict[str, str] = {}
    key = None
    for line in text.split("\n"):
        if match := _KEY.match(line):
            key = match[1]
            values[key] = match[2]
        elif key:
            values[key] += f"\n{line}"
    return {key: value.strip() for key, value in values.items()}


def _episode(html: str, run: dict[str, Any], outcomes: dict[str, _Outcome]) -> dict[str, Any]:
    config_text, blocks = _blocks(html)
    config = _config(config_text)
    number = config.get("task_id")
    if not number:
        raise Bad("missing_key", "the task's config has no task_id")
    logged = outcomes.get(number) or _Outcome(None)
    kind = "html" if run.get("observation_type") == "html" else "axtree"
    final: _Block | None = None
    if blocks and not blocks[-1].response and blocks[-1].parsed.startswith(("stop [Early stop:", "stop [ERROR:")):
        final = blocks.pop()
    steps = [_step(block, kind) for block in blocks]
    for step, after in zip(steps, [*blocks[1:], final], strict=bool(blocks)):
        if after and after.before.startswith(_NOT_FOUND):
            step["action_error"] = after.before
    end = _end(steps, final, logged)
    if steps:
        steps[-1] |= {"terminated": end["terminated"], "truncated": end["truncated"]}
    reward = None if logged.passed is None else float(logged.passed)
    give_outcome(steps, reward)
    if final:
        told = {"stopped_by_harness": final.parsed}
        steps.append(_seen(final, kind) | {"is_final_observation": True, "extra": told})
    sites = _SITE.findall(config.get("sites", ""))
    visual = "visual_difficulty" in config or "image" in config
    benchmark = "visualwebarena" if visual else "webarena"
    extra: dict[str, Any] = {"config": config, "arguments": run}
    if logged.error:
        extra["error"] = logged.error
    return end | {
        "native_id": number,
        "steps": numbered(steps),
        "benchmark": benchmark,
        "task_id": "/".join([benchmark, *(["+".join(sites)] if visual and sites else []), number]),
        "task_family": config.get("intent_template_id"),
        "site": "+".join(sites) or None,
        "start_url": config.get("start_url"),
        "goal": config.get("intent") or logged.intent,
        "outcome_reward": reward,
        "raw_reward": reward,
        "success": logged.passed,
        "started_at": logged.started_at,
        "quality_flags": ("unlabelled",) if reward is None else (),
        "extra": extra,
    }


def _end(steps: list[dict[str, Any]], final: _Block | None, logged: _Outcome) -> dict[str, Any]:
    terminated, truncated, reason, answer = None, None, "unknown", None
    if final:
        early = next((why for start, why in _HARNESS.items() if final.parsed.startswith(start)), None)
        reason = early or "agent_error"
        if early:
            terminated, truncated = early == "env_done", early != "env_done"
    elif steps and steps[-1].get("action_name") == "stop":
        terminated, truncated, reason = True, False, "agent_stop"
        answer = (steps[-1].get("action_args") or {}).get("answer")
    elif logged.passed is not None:  # evaluated after an action that is no stop: the environment ended it
        terminated, truncated, reason = True, False, "env_done"
    elif logged.error:
        reason = "agent_error" if logged.error.startswith("[OpenAI") else "env_error"
    return {"terminated": terminated, "truncated": truncated, "end_reason": reason, "final_answer": answer}


def _seen(block: _Block, kind: str) -> dict[str, Any]:
    seen: dict[str, Any] = {"url": block.url, "observation": block.page, "observation_kind": kind}
    if block.image:
        seen["screenshot"] = _media.of_base64(block.image)
    return seen


def _step(block: _Block, kind: str) -> dict[str, Any]:
    step = _seen(block, kind) | {"extra": {"parsed_action": block.parsed, "action_before": block.before}}
    if block.response is None:
        return step | {"action": block.parsed, "action_grammar": "playwright"}
    step |= {"action_grammar": "webarena", "response": block.response}
    if block.parsed == "none":
        return step | {"action": None, "action_valid": False}
    command = block.parsed
    parts = block.response.split(_FENCE, 2)
    if len(parts) == 3:
        command, step["thought"] = parts[1].strip(), parts[0].strip() or None
    return step | {"action": command} | _named(command)


def _named(command: str) -> dict[str, Any]:
    """Name and arguments of ``name [argument] ...``; nothing for what has another form."""
    match = _COMMAND.match(command.partition(" where [")[0] if command.startswith(("click", "hover")) else command)
    if match is None:
        return {}
    name, inner = match.groups()
    if inner is None:
        return {"action_name": name, "action_args": {}}
    args = {_ARGS.get(name, "argument"): inner}
    if name == "type" and (typed := _TYPED.match(inner)):
        text, enter, flag = typed[2].rpartition("] [")
        args = (
            {"id": typed[1], "text": text, "enter": flag}
            if enter and flag in "01"
            else {"id": typed[1], "text": typed[2]}
        )
    fields: dict[str, Any] = {"action_name": name, "action_args": args}
    if "id" in args:
        fields["target"] = {"ref": args["id"]}
    return fields

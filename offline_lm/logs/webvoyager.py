"""WebVoyager and OpenWebVoyager results: ``taskNAME/interact_messages.json`` beside the pictures ``screenshotN.png``.

The file is the whole conversation: a system prompt, then an observation and a reply, in turn. The first observation
begins with ``Now given a task: GOAL  Please interact with URL and get the answer.`` A reply is ``Thought: ...
Action: ...``, with one of ``Click [16]``, ``Type [2]; text``, ``Scroll [WINDOW]; down``, ``Wait``, ``GoBack``,
``Google`` and ``ANSWER; text``. Models add remarks to it (``Click [9] (to show the list)``) and leave out brackets;
as in the runner, the first pattern found anywhere in the command counts.

- An observation is the list of elements or the accessibility tree; the sentence that asks for the next action is left
  out. The runner keeps only the last few and writes ``(Omitted in context.)`` for the earlier ones: they are null,
  with the flag ``omitted_observations``, unless the folder has the tree in ``accessibility_treeN.txt``.
- Base64 is always cut from the messages (``{b64_img}``). The picture is that in ``screenshotN.png``, N the number of
  the reply; where the file is not there it is ``removed``.
- What the runner says after an action that failed is that action's ``action_error``, and stands in the observation
  that follows: alone (WebVoyager), or before the page. A reply without thought or action, or whose command is none of
  the above, has ``action_valid=False``.
- ``ANSWER`` ends the run (``agent_stop``). A run without it that has `max_iter` replies ran into the limit, which the
  folder does not hold: 15, as in the published script, unless the option says otherwise. Fewer replies: not known why.
- No outcome is stored: rewards are null, with the flag ``unlabelled``.

The folder above the task's is the run; task ids repeat between runs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from offline_lm.logs import _files, _media
from offline_lm.logs._adapters import Sample, contents, need, numbered, rejected, take
from offline_lm.logs._records import Bad, parse
from offline_lm.types import Episode, Rejected

SOURCE = "webvoyager"
MESSAGES = "interact_messages.json"
MAX_ITER = 15

_TASK = re.compile(r"\s*Now given a task:(.*?)Please interact with\s+(\S+)\s+and get the answer\.", re.DOTALL)
_OMITTED = re.compile(r"(?:A|An) [^.]*\. \(Omitted in context\.\)")
_FAILED = ("Format ERROR:", "The action you have chosen cannot be")
_ASKS = re.compile(
    rf"((?:note:|{'|'.join(_FAILED)}).*?)?please analyze the (?:attached )?(?:screenshot|accessibility tree)[^\n]*\n?",
    re.IGNORECASE,
)
_SPLIT = re.compile(r"Thought:|Action:|Observation:")

# In the order in which the runner tries them.
_COMMANDS: tuple[tuple[str, re.Pattern[str], tuple[str, ...]], ...] = (
    ("click", re.compile(r"Click \[?(\d+)\]?"), ("ref",)),
    ("type", re.compile(r"Type \[?(\d+)\]?[; ]+\[?([^\]]+)\]?"), ("ref", "text")),
    ("scroll", re.compile(r"Scroll \[?(\d+|WINDOW)\]?[; ]+\[?(up|down)\]?"), ("ref", "direction")),
    ("wait", re.compile(r"\AWait"), ()),
    ("goback", re.compile(r"\AGoBack"), ()),
    ("google", re.compile(r"\AGoogle"), ()),
    ("restart", re.compile(r"\ARestart"), ()),  # OpenWebVoyager's name for it
    ("answer", re.compile(r"ANSWER[;: ]+(.+)", re.DOTALL), ("text",)),
)


def detect(sample: Sample) -> str | None:
    if MESSAGES in sample.names or sample.name == MESSAGES:
        return f"a task's folder with {MESSAGES}"
    return None


def find(path: Path) -> Iterator[Path]:
    return _files.find(path, (MESSAGES,))


def read(
    path: Path, *, dataset: str | None = None, model: str | None = None, max_iter: int = MAX_ITER
) -> Iterator[Episode | Rejected]:
    """Every interact_messages.json at or below `path`: one Episode or one Rejected for each.

    `dataset` is the run's folder unless given; `model` is not logged; `max_iter` is the runner's ``--max_iter``.

    Raises:
        UserError: a folder without any such file.
    """
    return (_read_file(file, dataset, model, max_iter) for file in find(path))


def _read_file(path: Path, dataset: str | None, model: str | None, max_iter: int) -> Episode | Rejected:
    data = b""
    try:
        data = contents(path)
        if not data.strip():
            raise Bad("empty_file", "the file is empty; the run was stopped before it was written")
        return _episode(parse(data), path, hashlib.sha256(data).hexdigest(), dataset, model, max_iter)
    except Bad as bad:
        return rejected(SOURCE, path, bad, 0, data)


def _episode(messages: Any, path: Path, sha256: str, dataset: str | None, model: str | None, max_iter: int) -> Episode:
    if type(messages) is not list:
        raise Bad("wrong_type", "the file must be a list of messages with a role")
    task_folder, run = path.parent.name, path.parent.parent.name
    task_id = task_folder.removeprefix("task") or None
    steps, told = _steps(messages, path.parent)
    acting = [step for step in steps if "action_grammar" in step]
    if not acting:
        raise Bad("no_steps", "the conversation holds no reply of the agent; leave the task out")
    answered = acting[-1].get("action_name") == "answer"
    limited = not answered and len(acting) >= max_iter
    terminated, truncated, reason = None, None, "unknown"
    if answered or limited:
        terminated, truncated, reason = answered, limited, "agent_stop" if answered else "step_limit"
    elif len(steps) > len(acting):  # the last observation has no reply: the call of the model failed
        reason = "agent_error"
    acting[-1] |= {"terminated": terminated, "truncated": truncated}
    omitted = any(step.get("observation") is None for step in acting)
    return Episode(
        source=SOURCE,
        native_id=f"{run}/{task_folder}",
        dataset=dataset or run or None,
        steps=numbered(steps),
        benchmark=SOURCE,
        task_id=task_id,
        site=task_id.split("--")[0] if task_id and "--" in task_id else None,
        start_url=told.pop("start_url", None),
        goal=told.pop("goal", None),
        policy_kind="llm",
        model=model,
        agent=SOURCE,
        terminated=terminated,
        truncated=truncated,
        end_reason=reason,
        final_answer=acting[-1]["action_args"]["text"] if answered else None,
        uri=str(path),
        sha256=sha256,
        quality_flags=("unlabelled", "omitted_observations") if omitted else ("unlabelled",),
        extra=told,
    )


def _steps(messages: list[Any], folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(fields of each step, what the conversation says of the whole task)."""
    steps: list[dict[str, Any]] = []
    told: dict[str, Any] = {}
    seen: dict[str, Any] = {}
    turn = 1
    for i, message in enumerate(messages):
        place = f"messages[{i}]"
        role = need(message, "role", str, place)
        if role == "assistant":
            observed = seen or {"observation": "", "observation_kind": "text"}
            steps.append(observed | _reply(take(message, "content", str, place), observed.get("observation") or ""))
            seen, turn = {}, turn + 1
            continue
        text, pictured = _content(message.get("content"), f"{place}.content")
        if role == "system":
            told["system_prompt"] = text
            continue
        if match := _TASK.match(text):
            told |= {"goal": match[1].strip(), "start_url": match[2]}
            text = text[match.end() :]
        text = text.strip().removeprefix("Observation:").strip()
        asks = _ASKS.match(text)
        if steps and text.startswith(_FAILED):
            steps[-1]["action_error"] = (asks[1] if asks else text).strip()
        seen = _observation(text, asks, pictured, folder, turn)
    if seen and steps:
        steps.append(seen | {"is_final_observation": True})
    return steps, told


def _content(content: Any, place: str) -> tuple[str, bool]:
    """(text, whether a picture was there, whose base64 the runner has cut)."""
    if type(content) is str:
        return content, False
    if type(content) is not list:
        raise Bad("wrong_type", f"{place} is neither text nor a list of parts")
    kinds = [take(part, "type", str, f"{place}[{i}]") for i, part in enumerate(content)]
    texts = [take(part, "text", str, f"{place}[{i}]") for i, part in enumerate(content)]
    return "\n".join(text for text in texts if text), "image_url" in kinds


def _observation(text: str, asks: re.Match[str] | None, pictured: bool, folder: Path, turn: int) -> dict[str, Any]:
    tree = "accessibility tree" in text[:400].lower()
    step: dict[str, Any] = {"observation_kind": "axtree" if tree else "text"}
    omitted = _OMITTED.match(text)
    shown = _media.of_file(folder / f"screenshot{turn}.png")
    if shown["status"] != "missing":
        step["screenshot"] = shown
    elif pictured or (omitted and "screenshot" in text):
        step["screenshot"] = _media.removed()
    if omitted is None:
        page = text if asks is None else text[asks.end() :].strip().removesuffix("Screenshot:").rstrip()
        note = asks[1].strip() + "\n" if asks and asks[1] else ""
        return step | {"observation": note + page}
    if tree and (logged := _tree(folder / f"accessibility_tree{turn}.txt")) is not None:
        return step | {"observation": logged}
    if "screenshot" not in step:
        step["observation_error"] = text
    return step


def _tree(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        return contents(path).decode().strip()
    except UnicodeDecodeError as error:
        raise Bad("invalid_utf8", f"{path.name}: byte {error.start} is not UTF-8; re-encode the file") from None


def _reply(text: str | None, page: str) -> dict[str, Any]:
    step: dict[str, Any] = {"response": text, "action_grammar": SOURCE, "action_valid": False}
    if text is None:
        return step | {"action": ""}
    parts = _SPLIT.split(text)
    if "Thought:" not in text or "Action:" not in text or len(parts) < 3:
        return step
    command = parts[2].strip()
    step |= {"thought": parts[1].strip() or None, "action": command}
    for name, pattern, keys in _COMMANDS:
        if match := pattern.search(command):
            args = dict(zip(keys, match.groups(), strict=True))
            if name == "answer":
                args["text"] = _unbracketed(args["text"].strip())
            step |= {"action_valid": True, "action_name": name, "action_args": args}
            if args.get("ref", "WINDOW") != "WINDOW":
                step["target"] = _element(page, args["ref"])
            break
    return step


def _unbracketed(text: str) -> str:
    return text[1:-1] if text.startswith("[") and text.endswith("]") and text.count("[") == 1 else text


def _element(page: str, ref: str) -> dict[str, Any]:
    """The element by its number: ``[2]: <button> "Search"`` in a list, ``[2] button 'Search'`` in a tree."""
    target: dict[str, Any] = {"ref": ref}
    if listed := re.search(rf'\[{ref}\]: (?:<(\w+)> )?"([^"]*)"', page):
        return target | {"tag": listed[1], "text": listed[2]}
    if node := re.search(rf"\[{ref}\] (\w+) '([^'\n]*)'", page):
        return target | {"role": node[1], "text": node[2]}
    return target

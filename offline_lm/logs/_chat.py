"""Conversations as steps: one for each message of the assistant. Shared by every format that logs messages.

A message is an object with ``role`` and ``content`` (text, or a list of parts as OpenAI and Anthropic write them) and,
for the assistant, ``tool_calls`` or ``function_call``. What came since the last decision is the step's ``messages``;
the assistant's whole output is its ``response``: reasoning that was logged apart stands first, in ``<think>``, and tool
calls last, in ``<tool_call>``. The ``action`` is the command in it, by the first of these that fits:

1. tool calls, as fields of the message or as ``<tool_call>{"name": ..., "arguments": ...}</tool_call>`` in its text
2. the last ``<action>...</action>`` (or ``<act>``)
3. WebArena's answer, ``the next action I will perform is ```click [12]``` `` (or ``my next action will be ...``)
4. ReAct: what follows the last line that begins with ``Action:``
5. the text without its ``<think>``

What stands before the command is the ``thought``.
"""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

import orjson

from offline_lm.logs import _media
from offline_lm.logs._adapters import call_text, need, take, to_json
from offline_lm.logs._records import Bad, parse
from offline_lm.types import Step

ASSISTANT = frozenset({"assistant", "gpt", "model", "ai", "bot"})
_REASONING = ("reasoning_content", "reasoning", "thinking")
_READ = frozenset({"role", "content", "tool_calls", "function_call", *_REASONING})
_IMAGES = frozenset({"image_url", "image", "input_image"})

_THINK = re.compile(r"\A\s*<think(?:ing)?>(.*?)</think(?:ing)?>\s*", re.DOTALL)
_WEBARENA = re.compile(r"next action [^`\n]{0,40}\b(?:is|be):?\s*```")
_REACT = re.compile(r"^[ \t]*Action[ \t]*:[ \t]*", re.MULTILINE)
_THOUGHT = re.compile(r"\A\s*Thought[ \t]*:\s*")
_NAME = re.compile(r"(\w+)(?=[ \t]*\[|\Z)")
_ARGUMENTS = re.compile(r"(?:[ \t]*\[[^\[\]]*\])*")
_DATA_URL = re.compile(r"data:[\w/+.-]*;base64,")

Call = tuple[str, Any, dict[str, Any]]
"""name, arguments, the call as it was logged"""


# --- content ------------------------------------------------------------------------------------------------


def content_text(content: Any, place: str) -> tuple[str, list[dict[str, Any]]]:
    """(text, pictures) of a message's content: a string, null, or a list of parts.

    A picture leaves ``[image SHA256]`` in the text. Raises Bad for a content of another shape.
    """
    if content is None:
        return "", []
    if type(content) is str:
        return content, []
    if type(content) is not list:
        raise Bad("wrong_type", f"{place} is neither text nor a list of parts")
    texts: list[str] = []
    shots: list[dict[str, Any]] = []
    for i, part in enumerate(content):
        text, pictures = _part(part, f"{place}[{i}]")
        texts.append(text)
        shots += pictures
    return "\n".join(texts), shots


def _part(part: Any, place: str) -> tuple[str, list[dict[str, Any]]]:
    if type(part) is str:
        return part, []
    kind = take(part, "type", str, place)
    if kind in _IMAGES:
        shot = _picture(part)
        return f"[image {shot['sha256'] or shot['status']}]", [shot]
    if kind == "tool_result":
        return content_text(part.get("content"), f"{place}.content")
    if type(part.get("text")) is str:
        return part["text"], []
    return to_json(_without_base64(part)), []


def _picture(part: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's ``image_url`` (object or string), Anthropic's ``source.data``, or a bare ``image``."""
    where = part.get("image_url", part.get("source", part.get("image")))
    if type(where) is dict:
        where = where.get("url", where.get("data"))
    if type(where) is not str or not where:
        return _media.removed()
    if where.startswith(("http://", "https://", "file:")):
        return _media.missing()
    return _media.of_base64(where)


def _without_base64(value: Any) -> Any:
    """Sound, files and the like: their bytes leave the text."""
    if type(value) is dict:
        return {
            key: "[removed]" if key in ("data", "file_data") and type(item) is str else _without_base64(item)
            for key, item in value.items()
        }
    if type(value) is list:
        return [_without_base64(item) for item in value]
    return "[removed]" if type(value) is str and _DATA_URL.match(value) else value


# --- from messages to steps ---------------------------------------------------------------------------------


def split(messages: list[Any], place: str = "messages", context: Collection[int] = ()) -> list[dict[str, Any]]:
    """The fields of each Step of a conversation: one for each assistant message, in order.

    Assistant messages whose index is in `context` are no decisions (an example in the prompt, say): they stand among
    the messages. What follows the last decision is the final observation. Pictures become ``screenshot`` (the last one
    that the turn showed) and leave the messages. ``context_hash`` is the same for two steps that saw the same
    conversation.

    Raises:
        Bad: ``wrong_type`` or ``missing_key``, with the place of the message.
    """
    steps: list[dict[str, Any]] = []
    seen: list[dict[str, Any]] = []
    shots: list[dict[str, Any]] = []
    digest = hashlib.sha256()
    for i, message in enumerate(messages):
        here = f"{place}[{i}]"
        role = need(message, "role", str, here)
        if role in ASSISTANT and i not in context:
            step = _seen(seen, shots, digest) | _decision(message, here)
            digest.update(orjson.dumps([step["response"]]))
            steps.append(step)
            seen, shots = [], []
            continue
        text, pictures = content_text(message.get("content"), f"{here}.content")
        seen.append(message if type(message.get("content")) is str else {**message, "content": text})
        shots += pictures
    if seen and steps:
        steps.append(_seen(seen, shots, digest) | {"is_final_observation": True})
    return steps


def _seen(messages: list[dict[str, Any]], shots: list[dict[str, Any]], digest: Any) -> dict[str, Any]:
    text = to_json(messages)
    digest.update(text.encode())
    step: dict[str, Any] = {
        "messages": text,
        "observation_kind": "messages",
        "context_hash": digest.copy().hexdigest(),
    }
    if shots:
        step["screenshot"] = shots[-1]
    return step


def _decision(message: dict[str, Any], place: str) -> dict[str, Any]:
    """What an assistant message says: its whole response, its reasoning, and its command."""
    content, reasoning, used = _anthropic(message.get("content"), place)
    text, _ = content_text(content, f"{place}.content")
    reasoning += [m for key in _REASONING if type(m := message.get(key)) is str and m.strip()][:1]
    if reasoning and not _THINK.match(text):
        text = f"<think>{''.join(reasoning)}</think>\n{text}"
    logged = _calls(message, place) + used
    step = _command(text, logged)
    extra = {key: item for key, item in message.items() if key not in _READ and item is not None}
    kept = {"tool_calls": [raw for _, _, raw in logged]} if logged else {}
    if kept := kept | ({"message": extra} if extra else {}):
        step["extra"] = kept
    return step | {"response": "\n".join([text] * bool(text) + _tagged(logged))}


def _tagged(calls: list[Call]) -> list[str]:
    return [f"<tool_call>{to_json({'name': name, 'arguments': args})}</tool_call>" for name, args, _ in calls]


def _anthropic(content: Any, place: str) -> tuple[Any, list[str], list[Call]]:
    """(content without them, reasoning, tool calls) of Anthropic's parts ``thinking`` and ``tool_use``."""
    if type(content) is not list:
        return content, [], []
    rest: list[Any] = []
    reasoning: list[str] = []
    calls: list[Call] = []
    for i, part in enumerate(content):
        here = f"{place}.content[{i}]"
        kind = part.get("type") if type(part) is dict else None
        if kind == "thinking":
            reasoning.append(need(part, "thinking", str, here))
        elif kind == "tool_use":
            calls.append((need(part, "name", str, here), part.get("input"), part))
        else:
            rest.append(part)
    return rest, reasoning, calls


def _calls(message: dict[str, Any], place: str) -> list[Call]:
    """Each tool call that a message has as a field: OpenAI's, the older function_call, and flat ones."""
    given = take(message, "tool_calls", list, place) or []
    if not given and type(message.get("function_call")) is dict:
        given = [message["function_call"]]
    calls = []
    for i, call in enumerate(given):
        here = f"{place}.tool_calls[{i}]"
        inner = take(call, "function", dict, here) or call
        name = need(inner, "name", str, here)
        args = inner.get("arguments", inner.get("args", inner.get("input")))
        calls.append((name, _json_or_text(args), call))
    return calls


def _json_or_text(args: Any) -> Any:
    """Arguments, which are often JSON in a string; a model may also write what is no JSON."""
    if type(args) is not str:
        return args
    try:
        return parse(args.encode())
    except Bad:
        return args


def _command(text: str, calls: list[Call]) -> dict[str, Any]:
    """thought, action and what is known of the action, by the rules above."""
    think = _THINK.match(text)
    rest = text[think.end() :] if think else text
    before, command, grammar = rest, "", "tool_call"
    if not calls:
        before, calls = _calls_in(rest)
    step: dict[str, Any] = {}
    if calls:
        name, args, _ = calls[0]
        texts = [call_text(name, args) for name, args, _ in calls]
        step |= {"action_name": name, "action_args": args if type(args) is dict else {"arguments": args}}
        if len(texts) > 1:
            step["sub_actions"] = tuple(texts)
        command = "; ".join(texts)
    else:
        before, command, grammar = _written(rest)
        if grammar != "text" and (name := _NAME.match(command)):
            step["action_name"] = name[1]
            if _ARGUMENTS.fullmatch(command, name.end()):
                step["action_args"] = {"arguments": re.findall(r"\[([^\[\]]*)\]", command)}
    thoughts = [think[1].strip() if think else "", _THOUGHT.sub("", before).strip()]
    return step | {
        "action": command,
        "action_grammar": grammar,
        "thought": "\n\n".join(filter(None, thoughts)) or None,
    }


def _calls_in(text: str) -> tuple[str, list[Call]]:
    """(the text without them, the calls) of ``<tool_call>`` in a text; none if one of them is no call."""
    first, *pieces = text.split("<tool_call>")
    outside, calls = [first], []
    for piece in pieces:
        body, end, after = piece.partition("</tool_call>")
        call = _json_or_text(body) if end else None
        if type(call) is not dict or type(call.get("name")) is not str:
            return text, []
        calls.append((call["name"], call.get("arguments"), call))
        outside.append(after)
    return "".join(outside), calls


def _written(text: str) -> tuple[str, str, str]:
    """(what stands before, the command, the grammar) of an answer without tool calls."""
    for tag in ("action", "act"):
        before, _, tail = text.rpartition(f"<{tag}>")
        command, end, _ = tail.partition(f"</{tag}>")
        if end and command.strip():
            return before, command.strip(), "action_tag"
    if found := deque(_WEBARENA.finditer(text), maxlen=1):
        start = found[0].end()
        if command := text[start:].partition("```")[0].strip():
            return text[:start].removesuffix("```"), command, "webarena"
    if (found := deque(_REACT.finditer(text), maxlen=1)) and (command := text[found[0].end() :].strip()):
        return text[: found[0].start()], command, "react"
    return "", text.strip(), "text"


# --- from steps to messages ---------------------------------------------------------------------------------


def join(steps: Sequence[Step]) -> tuple[list[dict[str, Any]], list[int]]:
    """(messages, indices of those that are decisions): the conversation that `split` would make these steps of.

    A step without messages says what it saw as a message of the user.
    """
    messages: list[dict[str, Any]] = []
    decisions: list[int] = []
    for step in steps:
        if step.messages is not None:
            messages += orjson.loads(step.messages)
        else:
            messages.append({"role": "user", "content": step.observation or step.observation_error or ""})
        if not step.is_final_observation:
            decisions.append(len(messages))
            messages.append(_said(step))
    return messages, decisions


def _said(step: Step) -> dict[str, Any]:
    """The assistant message of a step; tool calls stand as they were logged, where they were."""
    text = step.response if step.response is not None else step.action or ""
    extra = step.extra or {}
    message: dict[str, Any] = {"role": "assistant", "content": text}
    raw, other = extra.get("tool_calls"), extra.get("message")
    if type(other) is dict:
        message |= {key: item for key, item in other.items() if key not in _READ}
    if type(raw) is list and all(type(call) is dict for call in raw):
        calls = [call if call.get("type") != "tool_use" else _openai(call) for call in raw]
        tags = "\n".join(_tagged(_calls({"tool_calls": calls}, "tool_calls")))
        if tags and text.endswith(tags):
            message |= {"content": text.removesuffix(tags).removesuffix("\n"), "tool_calls": calls}
    return message


def _openai(call: dict[str, Any]) -> dict[str, Any]:
    """Anthropic's ``tool_use`` as OpenAI writes a call."""
    function = {"name": call.get("name"), "arguments": to_json(call.get("input"))}
    return {"id": call.get("id"), "type": "function", "function": function}

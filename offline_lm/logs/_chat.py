"""Conversations as steps: one for each message of the assistant. Shared by every format that logs messages.

A message is an object with ``role`` and ``content`` (text, or a list of parts as OpenAI and Anthropic write them) and,
for the assistant, ``tool_calls`` or ``function_call``. What came since the last decision is the step's ``messages``;
the assistant's own text is its ``response``; a tool call is its ``action``.
"""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from typing import Any

import orjson

from offline_lm.logs import _media
from offline_lm.logs._adapters import call_text, need, take, to_json
from offline_lm.logs._records import Bad, parse

ASSISTANT = frozenset({"assistant", "gpt", "model", "ai", "bot"})
_REASONING = ("reasoning_content", "reasoning", "thinking")
_THINK = re.compile(r"\A\s*<think(?:ing)?>(.*?)</think(?:ing)?>\s*", re.DOTALL)


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
        here = f"{place}[{i}]"
        if type(part) is str:
            texts.append(part)
            continue
        kind = take(part, "type", str, here)
        if kind in ("image_url", "image", "input_image"):
            shot = _picture(part, here)
            shots.append(shot)
            texts.append(f"[image {shot['sha256'] or shot['status']}]")
        elif type(part.get("text")) is str:
            texts.append(part["text"])
        else:
            texts.append(to_json(part))
    return "\n".join(texts), shots


def _picture(part: dict[str, Any], place: str) -> dict[str, Any]:
    """OpenAI's ``image_url`` (object or string), Anthropic's ``source.data``, or a bare ``image``."""
    where = part.get("image_url", part.get("source", part.get("image")))
    if type(where) is dict:
        where = where.get("url", where.get("data"))
    if type(where) is not str or not where:
        return _media.removed()
    if where.startswith(("http://", "https://", "file:")):
        return _media.missing()
    return _media.of_base64(where)


def split(messages: list[Any], place: str = "messages") -> list[dict[str, Any]]:
    """The fields of each Step of a conversation: one for each assistant message, in order.

    What follows the last of them is the final observation. Pictures become ``screenshot`` (the last one that the turn
    showed) and leave the messages. ``context_hash`` is the same for two steps that saw the same conversation.

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
        text, pictures = content_text(message.get("content"), f"{here}.content")
        if role not in ASSISTANT:
            seen.append(
                {**message, "content": text} if pictures or type(message.get("content")) is not str else message
            )
            shots += pictures
            continue
        step = _seen(seen, shots, digest) | _decision(message, text, here)
        digest.update(orjson.dumps([step["response"]]))
        steps.append(step)
        seen, shots = [], []
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


def _decision(message: dict[str, Any], text: str, place: str) -> dict[str, Any]:
    """What an assistant message says: its whole response, its reasoning, and its command."""
    calls = _calls(message, place)
    thought = next(
        (m for k in ("reasoning_content", "reasoning", "thinking") if type(m := message.get(k)) is str), None
    )
    command = text
    if think := _THINK.match(text):
        thought, command = thought or think[1].strip(), text[think.end() :]
    step: dict[str, Any] = {"action_grammar": "text"}
    written = [text] if text else []
    if calls:
        texts = [call_text(name, args) for name, args, _ in calls]
        step = {
            "action_grammar": "tool_call",
            "action_name": calls[0][0],
            "action_args": calls[0][1] if type(calls[0][1]) is dict else {"arguments": calls[0][1]},
            "extra": {"tool_calls": [raw for _, _, raw in calls]},
        }
        if len(texts) > 1:
            step["sub_actions"] = tuple(texts)
        thought = thought or command.strip() or None
        command = "; ".join(texts)
        written += [f"<tool_call>{to_json({'name': n, 'arguments': a})}</tool_call>" for n, a, _ in calls]
    return step | {"response": "\n".join(written), "action": command.strip(), "thought": thought}


def _calls(message: dict[str, Any], place: str) -> list[tuple[str, Any, dict[str, Any]]]:
    """(name, arguments, as logged) of each tool call: OpenAI's, the older function_call, and flat ones."""
    given = take(message, "tool_calls", list, place) or []
    if not given and type(message.get("function_call")) is dict:
        given = [message["function_call"]]
    calls = []
    for i, call in enumerate(given):
        here = f"{place}.tool_calls[{i}]"
        inner = take(call, "function", dict, here) or call
        name = need(inner, "name", str, here)
        args = inner.get("arguments", inner.get("args", inner.get("input")))
        if type(args) is str:
            with suppress(Bad):  # a model may write arguments that are no JSON: they stand as the text they are
                args = parse(args.encode())
        calls.append((name, args, call))
    return calls

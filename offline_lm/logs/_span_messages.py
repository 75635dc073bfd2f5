"""Messages and scores as the conventions for traces write them, brought into the shape that `_chat` reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from offline_lm.logs._adapters import to_json
from offline_lm.logs._records import Bad, parse
from offline_lm.types import JSON

_ENV = ("env", "environment", "verifier")
_DEPTH = 20
REDACTED = "__REDACTED__"
"""What OpenInference writes where content was hidden."""


def from_json(value: Any) -> Any:
    """The value of a text that holds a JSON object or list; everything else as it is."""
    if type(value) is str and value.lstrip()[:1] in ("{", "["):
        try:
            return parse(value.encode(), refuse_duplicates=False)
        except Bad:
            return value
    return value


def messages(value: Any, role: str, place: str) -> list[JSON]:
    """Messages with role and content, from a list of them, one, or a text; `role` is that of a bare text.

    Raises Bad for anything else.
    """
    value = from_json(value)
    if type(value) is dict and type(value.get("messages")) is list:
        value = value["messages"]
    found: list[JSON] = []
    for i, item in enumerate(value if type(value) is list else [value]):
        if type(item) is dict:
            found += _message(item, role, f"{place}[{i}]")
        elif type(item) is str:
            found.append({"role": role, "content": item})
        else:
            raise Bad("wrong_type", f"{place}[{i}] is neither a message nor text")
    return found


def _message(item: JSON, role: str, place: str) -> Iterator[JSON]:
    """A message; one of parts (OpenTelemetry 1.37) may hold results of tools, which are messages of their own."""
    named = item.get("role")
    named = named if type(named) is str else role
    if type(item.get("parts")) is not list:
        if "content" in item or "tool_calls" in item or "function_call" in item:
            yield item | {"role": named}
        else:  # a provider's own object
            yield {"role": named, "content": to_json(item)}
        return
    content: list[JSON] = []
    calls: list[JSON] = []
    results: list[JSON] = []
    thoughts: list[str] = []
    for part in item["parts"]:
        part = part if type(part) is dict else {"type": "text", "content": to_json(part)}
        kind, said = part.get("type"), part.get("content")
        if kind == "text" and type(said) is str:
            content.append({"type": "text", "text": said})
        elif kind == "reasoning" and type(said) is str:
            thoughts.append(said)
        elif kind == "tool_call" and type(part.get("name")) is str:
            calls.append({"id": part.get("id"), "function": {"name": part["name"], "arguments": part.get("arguments")}})
        elif kind == "tool_call_response":
            given = part.get("response", part.get("result"))
            text = given if type(given) is str else to_json(given)
            results.append({"role": "tool", "content": text, "tool_call_id": part.get("id")})
        elif kind == "blob" and part.get("modality") == "image" and type(said) is str:
            content.append({"type": "image_url", "image_url": {"url": said}})
        elif kind == "uri" and part.get("modality") == "image":
            content.append({"type": "image_url", "image_url": {"url": part.get("uri")}})
        else:
            content.append({"type": "text", "text": to_json(part)})
    rest = {key: value for key, value in item.items() if key not in ("parts", "role", "content")}
    if content or calls or thoughts or not results:
        plain: Any = content
        if all(part["type"] == "text" for part in content):
            plain = "\n".join(part["text"] for part in content)
        made: JSON = {**rest, "role": named, "content": plain}
        if thoughts:
            made["reasoning_content"] = "\n".join(thoughts)
        yield made | ({"tool_calls": calls} if calls else {})
    yield from results


def answers(value: Any, place: str) -> list[JSON]:
    """As `messages`, for what a model gave back: always of the assistant, ``choices`` of a raw response unwrapped."""
    value = from_json(value)
    if type(value) is dict and type(value.get("choices")) is list:
        value = [c.get("message", c) if type(c) is dict else c for c in value["choices"]]
    if type(value) is dict and type(value.get("message")) is dict:
        value = value["message"]
    return [message | {"role": "assistant"} for message in messages(value, "assistant", place)]


def label(name: Any, value: Any, *, kind: str | None = None, reason: Any = None, said: Any = None) -> JSON:
    """Fields of a Label. A score whose name begins with env, environment or verifier is the environment's own."""
    name = name if type(name) is str else "score"
    kind = kind or ("env" if name.lower().replace(".", "_").replace("-", "_").split("_")[0] in _ENV else "judge")
    number = float(value) if isinstance(value, int | float) else None
    told = [text for text in (said, reason) if type(text) is str and text]
    return {"kind": kind, "labeler": None, "name": name, "value": number, "reason": ": ".join(told) or None}


def nested(attributes: JSON, prefix: str) -> list[JSON]:
    """``prefix.0.a.b = 1`` as [{a: {b: 1}}]: the lists of OpenInference and OpenLLMetry, flattened into names."""
    found: dict[int, JSON] = {}
    for key, value in attributes.items():
        if not key.startswith(prefix):
            continue
        index, *path = key[len(prefix) :].split(".")
        if not index.isdecimal() or len(index) > 6 or not path or len(path) > _DEPTH:
            continue
        node = found.setdefault(int(index), {})
        for name in path[:-1]:
            inner = node.get(name)
            if type(inner) is not dict:
                inner = node[name] = {}
            node = inner
        node[path[-1]] = value
    return [found[index] for index in sorted(found)]


def unflattened(message: Any, role: str) -> JSON:
    """A message of OpenInference (lists as {0: ..., 1: ...}) or OpenLLMetry, in the shape of OpenAI's."""
    message = message if type(message) is dict else {"content": message}
    content = message.get("content")
    parts = [item.get("message_content", item) for item in _listed(message.get("contents")) if type(item) is dict]
    thoughts: list[str] = []
    if parts:
        content = []
        for part in parts:
            text = part.get("text") if type(part) is dict else None
            if type(part) is not dict:
                continue
            if part.get("type") == "reasoning" and type(text) is str:
                thoughts.append(text)
            elif part.get("type") == "image":
                url = part.get("image")
                while type(url) is dict:
                    url = url.get("image", url.get("url"))
                content.append({"type": "image_url", "image_url": {"url": url}})
            elif type(text) is str:
                content.append({"type": "text", "text": text})
        if all(part["type"] == "text" for part in content):
            content = "\n".join(part["text"] for part in content)
    calls = []
    for call in _listed(message.get("tool_calls")):
        call = call.get("tool_call", call) if type(call) is dict else {}
        inner = call.get("function")
        function: JSON = inner if type(inner) is dict else call
        if type(function.get("name")) is str:
            made = {"name": function["name"], "arguments": function.get("arguments")}
            calls.append({"id": call.get("id"), "function": made})
    said = message.get("role")
    plain = "" if content is None or content == REDACTED else content
    made = {"role": said if type(said) is str else role, "content": plain if type(plain) in (str, list) else str(plain)}
    made |= {"tool_calls": calls} if calls else {}
    made |= {"reasoning_content": "\n".join(thoughts)} if thoughts else {}
    if type(answered := message.get("tool_call_id")) is str:
        made["tool_call_id"] = answered
    return made


def _listed(value: Any) -> list[Any]:
    if type(value) is list:
        return value
    if type(value) is dict:
        return [value[key] for key in sorted(value, key=lambda k: (len(k), k))]
    return []

"""From bytes to typed records: strict JSON, and a converter made from the dataclasses' own annotations.

Whatever is wrong raises `Bad`, with a stable reason code and a sentence that names the place and the mend.
"""

from __future__ import annotations

import json
import math
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from datetime import UTC, datetime
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import orjson

MAX_DEPTH = 64
_SPACED_COLON = re.compile(rb'(?<!(?<!\\)\\)"[ \t\r\n]+:')
_ESCAPED_COLON = re.compile(rb'(?<!\\)\\":')
_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")
_PYTHON = re.compile(r"True\b|False\b|None\b|'|nan\b|inf\b|b'|array\(")
_INT64 = 2**63


class Bad(Exception):
    """A record that cannot become what it should be."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


# --- JSON ---------------------------------------------------------------------------------------------------


def parse(data: bytes, *, refuse_duplicates: bool = True) -> Any:
    """Strict JSON: UTF-8, no NaN or infinity, no lone surrogates, no duplicate keys, at most MAX_DEPTH deep.

    Without `refuse_duplicates` the last of two equal keys is kept, and only the parser bounds the depth
    (1,024).

    A byte order mark before the value is left out.

    Raises Bad with one of the reasons invalid_utf8, utf16, null_bytes, json_truncated, json_number, lone_surrogate,
    too_deep, trailing_data, python_literal, control_character, bad_escape, json_syntax, duplicate_key.
    """
    if data.startswith(_BOM):
        data = data[len(_BOM) :]
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise _why(data, error) from None
    if refuse_duplicates:
        _refuse_duplicate_keys(data, count_keys(value))
    return value


def _why(data: bytes, error: orjson.JSONDecodeError) -> Bad:
    head = data[:4]
    if head.startswith(_UTF16) or (head.count(0) >= 2 and any(head)):
        return Bad("utf16", "the text is UTF-16 or UTF-32; re-encode the file as UTF-8")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as decode:
        return Bad("invalid_utf8", f"byte {decode.start} is not UTF-8; re-encode the file as UTF-8")
    where = f"at character {error.pos}"
    rest = text[error.pos : error.pos + 9].lstrip("-")
    if "surrogate" in error.msg:
        return Bad("lone_surrogate", f"half of a surrogate pair {where}; write the whole character")
    if "depth" in error.msg or "recursion" in error.msg.lower():
        return Bad("too_deep", f"nested too deeply {where}; at most {MAX_DEPTH} levels are read")
    if "infinity" in error.msg or rest.startswith(("NaN", "Infinity")):
        return Bad("json_number", f"a number that is not finite {where}; write null for what was not logged")
    if not text[error.pos :].strip():
        return Bad("json_truncated", f"the JSON ends too soon, {where}; was the file cut?")
    if text[error.pos] == "\0":
        return Bad("null_bytes", f"zero bytes {where}; a crash or a full disk leaves them: fetch the file again")
    if "after document" in error.msg:
        return Bad("trailing_data", f"a second value {where}; write one record a line, from one process at a time")
    if _PYTHON.match(text, error.pos):
        return Bad("python_literal", f"Python and not JSON {where}; write the record with json.dumps, not str")
    if "control character" in error.msg:
        return Bad("control_character", f"a raw control character {where}; write it as \\n, \\t or \\u00XX")
    if "escape" in error.msg:
        return Bad("bad_escape", f"an escape that JSON does not know {where}; double the backslash")
    return Bad("json_syntax", f"not JSON {where}: {error.msg}")


_HOLDERS = (dict, list)


def count_keys(value: Any) -> int:
    """Keys in all objects of a parsed value. Raises Bad if it is nested deeper than MAX_DEPTH."""
    count, level, depth = 0, [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise Bad("too_deep", f"nested more than {MAX_DEPTH} levels deep; flatten it")
        below: list[Any] = []
        for item in level:
            if type(item) is dict:
                count += len(item)
                item = item.values()
            elif type(item) is not list:
                continue
            for inner in item:
                if type(inner) in _HOLDERS:
                    below.append(inner)
        level = below
    return count


_BLOCK = 1 << 17
"""Bytes that are looked at together: they and what is made of them fit into a processor's cache."""
_FEW = 2048
"""Bytes up to which plain search is faster."""


def _colons(data: bytes) -> int:
    """Quotes with a colon after them, white space between or not; not those that one backslash escapes."""
    if len(data) <= _FEW:
        tight = data.count(b'":') - (len(_ESCAPED_COLON.findall(data)) if b'\\":' in data else 0)
        spaced = b" :" in data or b"\t:" in data or b"\r:" in data or b"\n:" in data
    else:
        tight, spaced = 0, False
        text = np.frombuffer(data, np.uint8)
        for start in range(0, len(data), _BLOCK):
            block = text[start : start + _BLOCK + 1]
            colon, before = block[1:] == ord(":"), block[:-1]
            quotes = np.flatnonzero(colon & (before == ord('"'))) + start
            escaped = (text[quotes - 1] == ord("\\")) & (text[quotes - 2] != ord("\\"))
            tight += len(quotes) - int(np.count_nonzero(escaped))
            spaced = spaced or bool((colon & (before <= ord(" "))).any())
    return tight + (len(_SPACED_COLON.findall(data)) if spaced else 0)


def _refuse_duplicate_keys(data: bytes, distinct: int) -> None:
    """orjson keeps the last of two equal keys and says nothing.

    Every key stands before a colon, so counting quotes with a colon after them, but for some that are surely escaped,
    bounds the number of keys in the text from above; where that equals the number of keys parsed, none was lost. Only
    otherwise is the text parsed again, slowly.
    """
    if _colons(data) == distinct:
        return
    without_escaped_quotes = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    if _colons(without_escaped_quotes) == distinct:
        return

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise Bad("duplicate_key", f"the key {twice[:50]!r} stands twice in one object; keep one")
        return result

    # Integers as text: Python refuses to convert very long ones, and their value does not matter here.
    json.loads(data, object_pairs_hook=unique, parse_int=str)


# --- typed fields -------------------------------------------------------------------------------------------

Converter = Callable[[Any, str], Any]
"""(value, place such as ``steps[3].reward``) -> the value to keep; raises Bad"""


def _wrong(value: Any, place: str, want: str) -> Bad:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    kind = names.get(type(value), "a number")
    shown = value[:40] if type(value) is str else value
    told = "" if type(value) in (dict, list, type(None)) else f" ({shown!r})"
    return Bad("wrong_type", f"{place} is {kind}{told}; it must be {want}")


def _text(value: Any, place: str) -> str:
    if type(value) is not str:
        raise _wrong(value, place, "a string")
    return value


def _bool(value: Any, place: str) -> bool:
    if type(value) is not bool:
        raise _wrong(value, place, "true or false")
    return value


def _int(value: Any, place: str) -> int:
    long = type(value) is float and abs(value) >= _INT64  # how orjson reads an integer over 64 bits
    if long or (type(value) is int and not -_INT64 <= value < _INT64):
        raise Bad("out_of_range", f"{place} does not fit into 64 bits")
    if type(value) is not int:
        raise _wrong(value, place, "an integer of at most 64 bits")
    return value


def _float(value: Any, place: str) -> float:
    if type(value) is not float and type(value) is not int:
        raise _wrong(value, place, "a number")
    if not math.isfinite(value):
        raise Bad("json_number", f"{place} is not finite; write null for what was not logged")
    return float(value)


def _time(value: Any, place: str) -> datetime:
    want = "a time such as 2026-11-21T09:30:00Z"
    if type(value) is not str:
        raise _wrong(value, place, want)
    try:
        time = datetime.fromisoformat(value)
        return time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise Bad("bad_time", f"{place} is {value[:40]!r}; it must be {want}") from None


def _object(value: Any, place: str) -> dict[str, Any]:
    if type(value) is not dict:
        raise _wrong(value, place, "an object")
    return value


def _tuple_of(item: Converter) -> Converter:
    def convert(value: Any, place: str) -> tuple[Any, ...]:
        if type(value) is not list:
            raise _wrong(value, place, "a list")
        return tuple([item(v, f"{place}[{i}]") for i, v in enumerate(value)])

    return convert


_SCALARS: dict[Any, Converter] = {
    str: _text,
    bool: _bool,
    int: _int,
    float: _float,
    datetime: _time,
    dict: _object,
}


def _converter(hint: Any) -> Converter:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        (inner,) = [a for a in args if a is not type(None)]
        return _converter(inner)
    if origin is tuple:
        return _tuple_of(_converter(args[0]))
    if (origin or hint) in _SCALARS:
        return _SCALARS[origin or hint]
    return record(hint)


def converters(cls: type, without: tuple[str, ...] = (), **replaced: Converter) -> dict[str, Converter]:
    """One converter for each field of a dataclass, by its annotation, save those left out or replaced."""
    hints = get_type_hints(cls)
    return {
        f.name: replaced[f.name] if f.name in replaced else _converter(hints[f.name])
        for f in fields(cls)
        if f.name not in without
    }


def convert(known: Mapping[str, Converter], value: dict[str, Any], place: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fields converted, keys that are not among them). Null is the same as absent."""
    kept: dict[str, Any] = {}
    unknown: dict[str, Any] = {}
    for key, item in value.items():
        converter = known.get(key)
        if converter is None:
            unknown[key] = item
        elif item is not None:
            kept[key] = converter(item, f"{place}{key}")
    return kept, unknown


def record(cls: type) -> Converter:
    """A converter from an object to the dataclass `cls`; keys that it lacks are refused."""
    known = converters(cls)
    required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]

    def to_record(value: Any, place: str) -> Any:
        kept, unknown = convert(known, _object(value, place), f"{place}.")
        for key in unknown:
            raise Bad("unknown_key", f"{place} has the key {key[:50]!r}; it may have: {', '.join(known)}")
        for name in required:
            if name not in kept:
                raise Bad("missing_key", f"{place}.{name} is missing")
        return cls(**kept)

    return to_record


def one_of(*allowed: str) -> Converter:
    """A string from a fixed list."""

    def check(value: Any, place: str) -> str:
        if _text(value, place) not in allowed:
            raise Bad("bad_value", f"{place} is {value[:40]!r}; it must be one of: {', '.join(allowed)}")
        return value

    return check

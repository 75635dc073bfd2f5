"""What a pickle may hold, without any of its classes: names, records, and the few constructors of plain values.

Nothing here imports or looks up what the data names, and every constructor checks what it is given: see `_pickle`.
"""

from __future__ import annotations

import hashlib
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta, timezone
from typing import Any, Literal

import numpy as np

from offline_lm.logs._records import Bad

_MAX_ITEMSIZE = 1 << 20
_SMALL_ARRAY = 1024


@dataclass(eq=False, slots=True)
class Name:
    """A class or function that the data refers to; it was not looked up."""

    name: str
    """module and name, as the data spells them"""


@dataclass(eq=False, slots=True)
class Record:
    """An object of a class that was not looked up: what the data stored in it."""

    name: str
    """module and class"""
    args: tuple[Any, ...] = ()
    """what its constructor was given"""
    attributes: dict[str, Any] = field(default_factory=dict)
    items: list[Any] | dict[Any, Any] | None = None
    """what it held, if its class is a list or a dict"""

    def get(self, key: str) -> Any:
        """An attribute, or an item of a dict; None if there is none."""
        if key in self.attributes:
            return self.attributes[key]
        return self.items.get(key) if isinstance(self.items, dict) else None


def refused(why: str) -> Bad:
    return Bad("pickle_refused", f"the pickle is not read: {why}")


def damaged(why: str) -> Bad:
    return Bad("pickle_damaged", f"the pickle is damaged: {why}; fetch the file again")


def check_key(value: Any, depth: int = 2) -> Any:
    """A key of a dict or item of a set: of a kind whose hash is cheap and runs no code."""
    if type(value) is tuple and depth:
        for item in value:
            check_key(item, depth - 1)
    elif type(value) is int and value.bit_length() > 64:  # multiples of the hash's modulus would all collide
        raise refused("a key is an integer of more than 64 bits")
    elif value is not None and not isinstance(
        value, str | bytes | bool | int | float | date | time | timedelta | Name | Record | np.number | np.str_
    ):
        raise refused(f"a key is a {type(value).__name__}")
    return value


def set_attributes(record: Record, state: Any) -> None:
    if type(state) is not dict or not all(type(key) is str for key in state):
        raise refused(f"the state of {record.name} is not an object of named attributes")
    record.attributes.update(state)


# --- names and calls ----------------------------------------------------------------------------------------

_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg", "UserDict": "collections"}
_PLAIN_TYPES = frozenset(
    f"builtins.{name}" for name in "object bool int float str tuple list dict set frozenset bytes complex type".split()
)
_STANDARD = re.compile(
    r"(?:pathlib\.(?:_local\.)?(?:Pure)?(?:Posix|Windows)?Path|uuid\.(?:UUID|SafeUUID)|decimal\.Decimal"
    r"|fractions\.Fraction|types\.SimpleNamespace|argparse\.Namespace|collections\.(?:UserDict|UserList|ChainMap)"
    r"|builtins\.slice|builtins\.range|builtins\.\w*(?:Error|Exception)|builtins\.KeyboardInterrupt|zoneinfo\.ZoneInfo)\Z"
)
"""Classes of the standard library whose objects stand in logs; they become records like any other."""
_CLASS = re.compile(r"_*[A-Z]\w*\Z", re.ASCII)
_DOTTED = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*\Z")
_DUNDER = re.compile(r"\b__\w+__\b")
_LIBRARIES = frozenset({"numpy", "torch", "pandas", "joblib", "cloudpickle", "dill"})
"""Libraries with constructors that run code or allocate at will; only what `_CALLS` holds is taken from them."""


def make_name(module: Any, name: Any) -> Name:
    """A reference, refused where it names what only an attack would: the standard library, and names of names."""
    if type(module) is not str or type(name) is not str or not _DOTTED.match(module) or not _DOTTED.match(name):
        raise refused("it names something in an unusual way")
    full = f"{_OLD_MODULES.get(module, module)}.{name}"
    top = full.partition(".")[0]
    known = full in _CALLS or full in _PLAIN_TYPES or full in _NUMPY_TYPES or _STANDARD.match(full)
    if not known and (top in sys.stdlib_module_names or top in _LIBRARIES or _DUNDER.search(name)):
        raise refused(f"it names {full[:80]}, which no log needs")
    return Name(full)


def call(called: Any, args: Any) -> Any:
    if not isinstance(called, Name) or type(args) is not tuple:
        raise refused("it calls what is no function")
    if make := _CALLS.get(called.name):
        try:
            return make(*args)
        except (TypeError, ValueError, OverflowError) as error:
            raise damaged(f"{called.name}: {str(error)[:80]}") from None
    return new_record(called, args)


def new_record(called: Any, args: Any) -> Record:
    if not isinstance(called, Name) or type(args) is not tuple:
        raise refused("it makes an object of what is no class")
    last = called.name.rpartition(".")[2]
    if called.name in _CALLS or called.name in _NUMPY_TYPES or called.name in _PLAIN_TYPES - {"builtins.object"}:
        raise refused(f"it makes a {called.name} in an unusual way")
    if not _CLASS.match(last) and not _STANDARD.match(called.name) and called.name != "builtins.object":
        raise refused(f"it calls {called.name[:80]}, which is not the name of a class")
    return Record(called.name, args)


def _reconstructor(cls: Name, base: Name, state: Any) -> Any:
    """``copyreg._reconstructor``: how protocols 0 and 1 write an object; `state` is set for subclasses of builtins."""
    record = new_record(cls, ())
    _expect(isinstance(base, Name) and base.name in _PLAIN_TYPES, "a base that is no plain type")
    if type(state) is list or type(state) is dict:
        record.items = state
    elif state is not None:
        record.args = (state,)
    return record


def _member(of: Any, name: Any) -> Record:
    """``getattr``, with which Python 3.11 writes members of an enum: the member's name; nothing is looked up."""
    _expect(type(name) is str and name.isidentifier() and not _DUNDER.search(name), "an attribute that is no member")
    return new_record(of, (name,))


def _expect(condition: object, what: str) -> None:
    if not condition:
        raise refused(f"it holds {what}")


def _items(values: Any = ()) -> list[Any]:
    _expect(type(values) in (list, tuple), "a set made of no list")
    return [check_key(value) for value in values]


def _bytes(value: Any = b"", encoding: str = "latin-1") -> bytes:
    """``bytes(...)``, ``bytearray(...)`` and ``codecs.encode``: never of a number, which would allocate."""
    if type(value) is str and encoding in ("latin-1", "latin1"):
        return value.encode("latin-1")
    if type(value) is not bytes:
        raise refused("it holds bytes made of something else")
    return value


def _mapping(*args: Any) -> dict[Any, Any]:
    """OrderedDict, Counter, defaultdict: a dict; the pairs come later, or as one list or dict."""
    given = args[-1] if args else ()
    if type(given) is dict:
        return dict(given)
    if type(given) is list:
        _expect(all(type(pair) in (list, tuple) and len(pair) == 2 for pair in given), "pairs of another length")
        return {check_key(key): value for key, value in given}
    return {}


def _deque(values: Any = (), maxlen: Any = None) -> list[Any]:
    _expect(type(values) in (list, tuple), "a deque made of no list")
    return list(values)


def _of_state(cls: type, size: int) -> Callable[..., Any]:
    """A time from the packed bytes of its pickle, or from plain numbers."""

    def make(*args: Any) -> Any:
        if len(args) in (1, 2) and type(args[0]) in (bytes, str):
            packed = args[0].encode("latin-1") if type(args[0]) is str else args[0]
            _expect(len(packed) == size, f"a {cls.__name__} of another length")
            _expect(len(args) == 1 or args[1] is None or isinstance(args[1], timezone), "an unknown time zone")
            return cls(packed, *args[1:])
        _expect(all(type(arg) is int for arg in args), f"a {cls.__name__} of no numbers")
        return cls(*args)

    return make


def _timedelta(*parts: Any) -> timedelta:
    _expect(len(parts) <= 3 and all(type(part) is int for part in parts), "a timedelta of no numbers")
    return timedelta(*parts)


def _timezone(offset: Any, name: Any = None) -> timezone:
    _expect(isinstance(offset, timedelta), "a time zone without an offset")
    return timezone(offset)


def _complex(real: Any, imaginary: Any) -> complex:
    _expect(type(real) is float and type(imaginary) is float, "a complex number of no floats")
    return complex(real, imaginary)


# --- numpy --------------------------------------------------------------------------------------------------

_PLAIN_DTYPE = re.compile(r"[|<>=]?(?:[?bBhHiIlLqQefdgFDG]|[biufcSUV]\d{1,7}|O8?|b1)\Z")
_ORDERS: dict[Any, Literal["<", ">", "|", "="]] = {
    "<": "<", ">": ">", "|": "|", "=": "=", b"<": "<", b">": ">", b"|": "|", b"=": "=",
}  # fmt: skip
_NUMPY_TYPES = frozenset({"numpy.ndarray"})


def _dtype_record(*args: Any) -> Record:
    return Record("numpy.dtype", args)


def _dtype(record: Any) -> np.dtype[Any]:
    """The dtype of a record that `_dtype_record` made and BUILD completed with its byte order."""
    spelled = record.args[0] if isinstance(record, Record) and record.name == "numpy.dtype" and record.args else None
    if type(spelled) is bytes:
        spelled = spelled.decode("latin-1")
    if type(spelled) is not str or not _PLAIN_DTYPE.match(spelled):
        raise refused("it holds an array of a structured or unknown type")
    try:
        dtype = np.dtype(spelled)
    except TypeError as error:  # a size that the kind does not have
        raise damaged(str(error)) from None
    state: Any = record.attributes.get("__state__")
    if state is not None:
        order = _byte_order(state)
        if order is None:
            raise refused("it holds an array of a structured type")
        dtype = dtype.newbyteorder(order)
    _expect(0 < dtype.itemsize <= _MAX_ITEMSIZE, "an array of elements without a sensible size")
    return dtype


def _byte_order(state: Any) -> Literal["<", ">", "|", "="] | None:
    if type(state) is not tuple or len(state) < 8 or any(part is not None for part in state[2:5]):
        return None
    return _ORDERS.get(state[1]) if type(state[1]) in (str, bytes) else None


def _reconstruct(cls: Any, shape: Any, code: Any) -> np.ndarray[Any, Any]:
    """An array to be filled by BUILD."""
    _expect(isinstance(cls, Name) and cls.name == "numpy.ndarray", "an array of a subclass")
    return np.empty(0, dtype="b")


def _shape(shape: Any) -> tuple[int, ...]:
    shape = (shape,) if type(shape) is int else shape
    plain = type(shape) is tuple and len(shape) <= 32 and all(type(n) is int and 0 <= n < 2**31 for n in shape)
    _expect(plain, "an array without a sensible shape")
    return shape


def _check_length(shape: tuple[int, ...], length: int) -> None:
    """An array may not be larger than the bytes that the pickle holds for it."""
    if math.prod(shape) != length:
        raise damaged(f"an array of shape {shape} has {length} elements")


def fill_array(array: np.ndarray[Any, Any], state: Any) -> None:
    """What an array's ``__setstate__`` does, after checking that the state is one of a plain array."""
    _expect(type(state) is tuple and len(state) == 5 and array.size == 0, "an array with an unusual state")
    dtype, shape, raw = _dtype(state[2]), _shape(state[1]), state[4]
    if dtype.hasobject:
        if type(raw) is not list:
            raise refused("it holds an array of objects without a list of them")
        _check_length(shape, len(raw))
    else:
        raw = _bytes(raw)
        _check_length(shape, _array_of(raw, dtype).size)
    array.__setstate__((1, shape, dtype, state[3] is True, raw))  # type: ignore[arg-type]


def _array_of(raw: Any, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    if type(raw) is not bytes or dtype.hasobject or len(raw) % dtype.itemsize:
        raise refused("it holds an array without its bytes")
    if dtype.kind == "U" and raw:
        codes = np.frombuffer(raw, np.dtype("u4").newbyteorder(dtype.byteorder))
        if codes.max() > sys.maxunicode:  # numpy trusts them
            raise damaged("an array holds characters that do not exist")
    return np.frombuffer(raw, dtype)


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray[Any, Any]:
    """How protocol 5 writes an array."""
    flat = _array_of(raw, _dtype(dtype))
    shape = _shape(shape)
    _check_length(shape, flat.size)
    return flat.reshape(shape, order="F" if order == "F" else "C")


def _numpy_scalar(dtype: Any, raw: Any) -> Any:
    flat = _array_of(_bytes(raw), _dtype(dtype))
    _check_length((), flat.size)
    return flat[0]


_CALLS: dict[str, Callable[..., Any]] = {
    "builtins.set": lambda values=(): set(_items(values)),
    "builtins.frozenset": lambda values=(): frozenset(_items(values)),
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "builtins.complex": _complex,
    "builtins.getattr": _member,
    "_codecs.encode": _bytes,
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": _mapping,
    "collections.Counter": _mapping,
    "collections.deque": _deque,
    "copyreg._reconstructor": _reconstructor,
    "copyreg.__newobj__": lambda cls, *args: new_record(cls, args),
    "datetime.datetime": _of_state(datetime, 10),
    "datetime.date": _of_state(date, 4),
    "datetime.time": _of_state(time, 6),
    "datetime.timedelta": _timedelta,
    "datetime.timezone": _timezone,
    "numpy.dtype": _dtype_record,
}
for _core in ("numpy.core", "numpy._core"):
    _CALLS[f"{_core}.multiarray._reconstruct"] = _reconstruct
    _CALLS[f"{_core}.multiarray.scalar"] = _numpy_scalar
    _CALLS[f"{_core}.numeric._frombuffer"] = _frombuffer


# --- as JSON ------------------------------------------------------------------------------------------------


def to_plain(value: Any) -> Any:
    """What `load` returned as JSON's own types: records by their attributes, long arrays and bytes by their hash."""
    if value is None or isinstance(value, str | bool):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, np.generic):
        return to_plain(value.item())
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**63 else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key if type(key) is str else _key_text(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((to_plain(item) for item in value), key=str)
    if isinstance(value, np.ndarray):
        if value.size <= _SMALL_ARRAY:
            return to_plain(value.tolist())
        digest = "" if value.dtype.hasobject else hashlib.sha256(np.ascontiguousarray(value).data).hexdigest()
        return {"array": str(value.dtype), "shape": list(value.shape), "sha256": digest}
    if isinstance(value, bytes):
        return {"bytes": len(value), "sha256": hashlib.sha256(value).hexdigest()}
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Name):
        return value.name
    if isinstance(value, Record):
        return _record_plain(value)
    return str(value)  # a date, time, timedelta, time zone or complex number


def _key_text(key: Any) -> str:
    return str(to_plain(key))


def _record_plain(record: Record) -> Any:
    if record.name.startswith("pathlib."):
        return "/".join(str(part) for part in record.args).replace("//", "/")
    fields: dict[str, Any] = {"class": record.name}
    if record.args:
        fields["args"] = to_plain(record.args)
    if record.items is not None:
        fields["items"] = to_plain(record.items)
    return fields | {str(key): to_plain(item) for key, item in record.attributes.items()}

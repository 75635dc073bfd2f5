"""Reading pickles without running them: a machine of our own for the opcodes, which imports and calls nothing.

A pickle is a program for a small stack machine; Python's own runs it with every class and function that the
program names. This one runs the same opcodes and builds plain values: containers, numpy arrays and scalars, times,
and for every class that is named a `Record`, its name and what was stored in it. A class is never looked up. The
few constructors that plain values need are written out in `_pickle_types`; a call of anything else that the data
names is refused, unless it looks like the constructor of an application's class, which becomes a Record too.

What is read is bounded in bytes, opcodes, containers, depth, and in the size that shared parts have when written
out, so that a few kilobytes cannot become gigabytes here or in what follows.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from offline_lm.logs._files import MAX_BYTES
from offline_lm.logs._pickle_types import (
    Name,
    Record,
    call,
    check_key,
    damaged,
    fill_array,
    make_name,
    new_record,
    refused,
    set_attributes,
    to_plain,
)

MAX_OPCODES = 4_000_000
MAX_CONTAINERS = 1_000_000
MAX_DEPTH = 64
MAX_WRITTEN = 20_000_000
"""Values of the result with shared ones counted each time: what writing it as JSON would visit."""
MAX_COPIED = 2 * MAX_BYTES
"""Bytes that constructors may copy: a part that stands once in the data can be copied by many calls."""
_MAX_INT_BITS = 4096
_ITEM_BYTES = 64


def load(data: bytes, limit: int = MAX_BYTES) -> Any:
    """The value that the pickle `data` describes; see the module for what can be in it.

    Raises:
        Bad: ``pickle_refused`` for what no log needs or what is too big, ``pickle_damaged`` for bytes that are no
            pickle or end too soon.
    """
    if len(data) > limit:
        raise refused(f"it is longer than {limit} bytes")
    value = _Machine().run(data)
    _check_shape(value)
    return value


# --- the machine --------------------------------------------------------------------------------------------

_MARK = object()
_VALUES = frozenset(
    "INT LONG BININT BININT1 BININT2 LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES "
    "SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8".split()
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_BUILT = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = frozenset({"PROTO", "FRAME"})


class _Machine:
    """The stack, the memo, and one method for each group of opcodes."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.containers = 0
        self.copied = 0
        self.handlers = self._handlers()

    def _handlers(self) -> dict[str, Callable[[Any], None]]:
        """What runs each opcode; those left out are refused: persistent ids, extension codes, buffers elsewhere."""
        handlers = dict.fromkeys(_VALUES, self.op_value)
        handlers |= {name: self.empty(make) for name, make in _BUILT.items()}
        handlers |= {name: self.constant(value) for name, value in _CONSTANTS.items()}
        handlers |= {name: self.short_tuple(size) for name, size in _TUPLES.items()}
        handlers |= {name[3:].upper(): getattr(self, name) for name in dir(self) if name.startswith("op_")}
        return handlers

    def run(self, data: bytes) -> Any:
        handlers = self.handlers
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
                if count > MAX_OPCODES:
                    raise refused(f"it has more than {MAX_OPCODES} opcodes")
                name = opcode.name
                if name == "STOP":
                    break
                if name in handlers:
                    handlers[name](argument)
                elif name not in _IGNORED:
                    raise refused(f"it uses {name}, which no log needs")
        except (ValueError, OverflowError) as error:  # genops raises these for bytes that it cannot decode
            raise damaged(str(error)[:120]) from None
        value = self.pop()
        if self.stack:
            raise damaged("values are left over at its end")
        return value

    # values

    def op_value(self, value: Any) -> None:
        if type(value) is int and value.bit_length() > _MAX_INT_BITS:
            raise refused(f"it holds an integer of more than {_MAX_INT_BITS} bits")
        self.stack.append(value)

    def constant(self, value: Any) -> Callable[[Any], None]:
        return lambda _: self.stack.append(value)

    def empty(self, make: Callable[[], Any]) -> Callable[[Any], None]:
        return lambda _: self.stack.append(self.counted(make()))

    def short_tuple(self, size: int) -> Callable[[Any], None]:
        return lambda _: self.stack.append(self.counted(tuple([self.pop() for _ in range(size)][::-1])))

    # stack and memo

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise damaged("a value is missing")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise damaged("a value is missing")
        return self.stack[-1]

    def marked(self) -> list[Any]:
        for at in range(len(self.stack) - 1, -1, -1):
            if self.stack[at] is _MARK:
                items = self.stack[at + 1 :]
                del self.stack[at:]
                return items
        raise damaged("a mark is missing")

    def counted(self, value: Any) -> Any:
        self.containers += 1
        if self.containers > MAX_CONTAINERS:
            raise refused(f"it builds more than {MAX_CONTAINERS} objects")
        return value

    def charge(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, str | bytes):
                self.copied += len(value)
            elif isinstance(value, list | tuple | dict | set | frozenset):
                self.copied += _ITEM_BYTES * len(value)
        if self.copied > MAX_COPIED:
            raise refused(f"it copies more than {MAX_COPIED} bytes")

    def op_mark(self, _: None) -> None:
        self.push(_MARK)

    def op_pop(self, _: None) -> None:
        if not self.stack:
            raise damaged("a value is missing")
        self.stack.pop()

    def op_pop_mark(self, _: None) -> None:
        self.marked()

    def op_dup(self, _: None) -> None:
        self.push(self.top())

    def op_put(self, index: int) -> None:
        self.memo[index] = self.top()

    op_binput = op_long_binput = op_put

    def op_memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.top()

    def op_get(self, index: int) -> None:
        if index not in self.memo:
            raise damaged(f"memo {index} is not set")
        self.push(self.memo[index])

    op_binget = op_long_binget = op_get

    # containers

    def op_tuple(self, _: None) -> None:
        self.push(self.counted(tuple(self.marked())))

    def op_list(self, _: None) -> None:
        self.push(self.counted(self.marked()))

    def op_dict(self, _: None) -> None:
        items = self.marked()
        self.push(self.counted({}))
        self.set_items(items)

    def op_frozenset(self, _: None) -> None:
        self.push(self.counted(frozenset(map(check_key, self.marked()))))

    def op_append(self, _: None) -> None:
        item = self.pop()
        self.extend([item])

    def op_appends(self, _: None) -> None:
        self.extend(self.marked())

    def extend(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Record) and target.items is None:
            target.items = self.counted([])
        target = target.items if isinstance(target, Record) else target
        if type(target) is not list:
            raise refused("it appends to what is no list")
        target.extend(items)

    def op_setitem(self, _: None) -> None:
        value = self.pop()
        key = self.pop()
        self.set_items([key, value])

    def op_setitems(self, _: None) -> None:
        self.set_items(self.marked())

    def set_items(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise damaged("a key has no value")
        target = self.top()
        if isinstance(target, Record) and target.items is None:
            target.items = self.counted({})
        target = target.items if isinstance(target, Record) else target
        if type(target) is not dict:
            raise refused("it sets items of what is no dict")
        target.update(zip(map(check_key, items[::2]), items[1::2], strict=True))

    def op_additems(self, _: None) -> None:
        items = self.marked()
        target = self.top()
        if type(target) is not set:
            raise refused("it adds to what is no set")
        target.update(map(check_key, items))

    def op_bytearray8(self, argument: bytes | bytearray) -> None:
        self.push(bytes(argument))

    # names, calls and objects

    def op_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.push(self.counted(make_name(module, name)))

    def op_stack_global(self, _: None) -> None:
        name, module = self.pop(), self.pop()
        self.push(self.counted(make_name(module, name)))

    def op_reduce(self, _: None) -> None:
        args = self.pop()
        called = self.pop()
        self.charge(args if type(args) is tuple else ())
        self.push(self.counted(call(called, args)))

    def op_newobj(self, _: None) -> None:
        args = self.pop()
        called = self.pop()
        self.push(self.counted(new_record(called, args)))

    def op_newobj_ex(self, _: None) -> None:
        named, args, called = self.pop(), self.pop(), self.pop()
        record = new_record(called, args)
        self.charge((named,))
        set_attributes(record, named)
        self.push(self.counted(record))

    def op_inst(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.push(self.counted(new_record(make_name(module, name), tuple(self.marked()))))

    def op_obj(self, _: None) -> None:
        called, *args = self.marked() or [None]
        self.push(self.counted(new_record(called, tuple(args))))

    def op_build(self, _: None) -> None:
        state = self.pop()
        target = self.top()
        self.charge((state, *state) if type(state) is tuple else (state,))
        if type(target) is np.ndarray:
            fill_array(target, state)
        elif not isinstance(target, Record):
            raise refused(f"it sets the state of a {type(target).__name__}")
        elif type(state) is tuple and len(state) == 2 and all(s is None or type(s) is dict for s in state):
            for part in state:  # __dict__ and __slots__
                set_attributes(target, part or {})
        elif type(state) is dict:
            set_attributes(target, state)
        else:
            target.attributes["__state__"] = state


# --- the shape of the result --------------------------------------------------------------------------------


def _children(value: Any) -> Iterable[Any]:
    if type(value) is dict:
        return [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return value
    if type(value) is Record:
        return (value.args, value.attributes, value.items)
    if type(value) is np.ndarray and value.dtype.hasobject:
        return value.flat
    return ()


def _check_shape(value: Any) -> None:
    """Refuses a value that holds itself, is nested too deeply, or would be huge when written out."""
    known: dict[int, tuple[int, int]] = {}
    """id -> (depth, size) of what was visited whole"""
    path: list[tuple[Any, Iterator[Any], list[int]]] = [(value, iter(_children(value)), [0, 1])]
    open_ids = {id(value)}
    while path:
        node, children, so_far = path[-1]
        for child in children:
            if isinstance(child, str | bytes | int | float | None):
                so_far[1] += 1
            elif id(child) in open_ids:
                raise refused("a value holds itself")
            elif (seen := known.get(id(child))) is not None:
                so_far[0], so_far[1] = max(so_far[0], seen[0] + 1), so_far[1] + seen[1]
            else:
                path.append((child, iter(_children(child)), [0, 1]))
                open_ids.add(id(child))
                break
        else:
            path.pop()
            open_ids.remove(id(node))
            size = so_far[1] + (node.size if type(node) is np.ndarray else 0)
            if size > MAX_WRITTEN:
                raise refused(f"written out it has more than {MAX_WRITTEN} values")
            if so_far[0] > MAX_DEPTH:
                raise refused(f"it is nested more than {MAX_DEPTH} levels deep")
            known[id(node)] = (so_far[0], size)
            if path:
                parent = path[-1][2]
                parent[0], parent[1] = max(parent[0], so_far[0] + 1), parent[1] + size
        if len(path) > 3 * MAX_DEPTH:
            raise refused(f"it is nested more than {MAX_DEPTH} levels deep")


__all__ = ["MAX_CONTAINERS", "MAX_DEPTH", "MAX_OPCODES", "MAX_WRITTEN", "Name", "Record", "load", "to_plain"]

"""What the reader of pickles builds, at every protocol, and that damaged bytes raise nothing but Bad."""

import datetime
import decimal
import enum
import pathlib
import pickle
import uuid
from collections import Counter, OrderedDict, defaultdict, deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offline_lm.logs._pickle import Record, load, to_plain
from offline_lm.logs._records import Bad


class Color(enum.Enum):
    RED = 1


@dataclass
class Flags:
    depth: int
    color: Color
    where: pathlib.PurePath


class Message(dict):
    pass


class Log(list):
    pass


class Slotted:
    __slots__ = ("a",)

    def __init__(self):
        self.a = 3


UTC = datetime.UTC
PLAIN = [
    None, True, -5, 2**80, 1.5, "é\udc80", b"ab", b"", [1, [2]], (1,), (), {"a": {1: (2, 3)}}, {1, 2}, frozenset([1]),
    bytearray(b"xy"), 2 + 3j, datetime.datetime(2025, 1, 2, 3, 4, 5, 6), datetime.datetime(2025, 1, 2, tzinfo=UTC),
    datetime.date(2025, 1, 2), datetime.time(1, 2, 3), datetime.timedelta(1, 2, 3),
]  # fmt: skip


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_come_back(protocol):
    assert load(pickle.dumps(PLAIN, protocol)) == PLAIN


@pytest.mark.parametrize("protocol", range(6))
def test_containers_of_collections(protocol):
    given: list[Any] = [OrderedDict(a=1), defaultdict(list, b=[2]), deque([1, 2]), Counter("aab")]
    assert load(pickle.dumps(given, protocol)) == [{"a": 1}, {"b": [2]}, [1, 2], {"a": 2, "b": 1}]


ARRAYS = [
    np.arange(6, dtype="<i8").reshape(2, 3),
    np.arange(6, dtype=">f4").reshape(3, 2).T,
    np.array([True, False]),
    np.array(["ab", "c"]),
    np.array([b"ab"]),
    np.zeros((0, 3), dtype=np.uint8),
    np.array([{"a": 1}, None], dtype=object),
    np.array(3.5),
]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype}{a.shape}")
def test_arrays_come_back(array, protocol):
    got = load(pickle.dumps({"x": array, "again": array}, protocol))["x"]
    again = pickle.loads(pickle.dumps(array, protocol))  # numpy may turn the byte order into the machine's
    assert (got.dtype, got.shape, got.tolist()) == (again.dtype, array.shape, array.tolist())


@pytest.mark.parametrize("protocol", range(6))
def test_scalars_of_numpy_come_back(protocol):
    given = [np.float64(1.5), np.int32(7), np.bool_(True), np.str_("x")]
    got = load(pickle.dumps(given, protocol))
    assert got == given
    assert [type(value) for value in got] == [type(value) for value in given]


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_both_names_of_numpys_core(core):
    data = (
        pickle.dumps(ARRAYS[0], 2)
        .replace(b"numpy._core.", b"numpy.core.")
        .replace(b"numpy.core.", core.encode() + b".")
    )
    assert load(data).tolist() == ARRAYS[0].tolist()


@pytest.mark.parametrize("protocol", range(6))
def test_classes_become_inert_records(protocol):
    value = {
        "flags": Flags(2, Color.RED, pathlib.PurePosixPath("/a/b")),
        "id": uuid.UUID(int=5),
        "d": decimal.Decimal("1.5"),
    }
    got = load(pickle.dumps(value, protocol))
    flags = got["flags"]
    assert type(flags) is Record
    assert flags.name == f"{__name__}.Flags"
    assert flags.get("depth") == 2
    assert flags.get("color").name == f"{__name__}.Color"
    assert to_plain(flags.get("where")) == "/a/b"
    assert to_plain(got["d"])["args"] == ["1.5"]
    assert to_plain(got["id"])["int"] == 5


@pytest.mark.parametrize("protocol", range(6))
def test_subclasses_of_containers_become_records_with_items(protocol):
    log = Log([1, 2])
    log.owner = "me"  # type: ignore[attr-defined]
    got = load(pickle.dumps([Message(role="user"), log], protocol))
    assert (got[0].items, got[0].get("role")) == ({"role": "user"}, "user")
    assert (got[1].items, got[1].get("owner")) == ([1, 2], "me")


@pytest.mark.parametrize("protocol", range(2, 6))
def test_slots(protocol):
    assert load(pickle.dumps(Slotted(), protocol)).attributes == {"a": 3}


def test_as_json():
    big = np.zeros(2000, dtype=np.uint8)
    value = {
        1: {2},
        "n": float("nan"),
        "i": 2**70,
        "b": b"x",
        "a": np.array([[1, 2]]),
        "big": big,
        "t": (np.float32(0.5),),
    }
    plain = to_plain(value)
    assert (plain["1"], plain["n"], plain["i"], plain["a"], plain["t"]) == ([2], None, str(2**70), [[1, 2]], [0.5])
    assert plain["b"]["bytes"] == 1
    assert (plain["big"]["array"], plain["big"]["shape"]) == ("uint8", [2000])


def test_characters_that_do_not_exist():
    data = pickle.dumps(np.array(["ab"]), 4).replace("ab".encode("utf-32-le"), b"\xff" * 8)
    with pytest.raises(Bad, match="characters that do not exist"):
        load(data)


GOOD = pickle.dumps([PLAIN, ARRAYS, Flags(2, Color.RED, pathlib.PurePosixPath("/a"))], 4)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_damaged_bytes_raise_only_bad(data):
    at = data.draw(st.integers(0, len(GOOD)))
    bad = GOOD[:at] + data.draw(st.binary(max_size=6)) + GOOD[at + data.draw(st.integers(0, 6)) :]
    with suppress(Bad):
        to_plain(load(bad))

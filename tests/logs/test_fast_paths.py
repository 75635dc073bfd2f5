"""Where reading takes a short cut, it must come to what the plain way comes to."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offline_lm.logs import _browser_use, _files, _records
from offline_lm.logs._adapters import take
from offline_lm.logs._files import Record, lines
from offline_lm.logs._records import Bad, parse

PATCHED = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

# --- duplicate keys -----------------------------------------------------------------------------------------

SPACE = st.sampled_from(["", "", " ", "\n", "\t ", "\r\n"])
TEXT = st.lists(st.sampled_from(['"', "\\", ":", '":', '" :', "a", "b", " ", "é", "\n", "{", "}", ","]), max_size=5)


@st.composite
def json_text(draw, depth=3):
    """JSON as anyone may write it: white space anywhere, keys that repeat, escapes of every kind."""

    def string():
        text = "".join(draw(TEXT))
        written = json.dumps(text, ensure_ascii=draw(st.booleans()))
        return written.replace("a", "\\u0061") if draw(st.booleans()) else written

    kind = draw(st.integers(0, 3 if depth else 1))
    if kind == 0:
        return draw(st.sampled_from(["1", "null", "-2.5e3"]))
    if kind == 1:
        return string()
    items = [draw(json_text(depth=depth - 1)) for _ in range(draw(st.integers(0, 3)))]
    if kind == 2:
        return "[" + draw(SPACE) + ("," + draw(SPACE)).join(items) + "]"
    pairs = [string() + draw(SPACE) + ":" + draw(SPACE) + item for item in items]
    return "{" + draw(SPACE) + ("," + draw(SPACE)).join(pairs) + draw(SPACE) + "}"


def repeats(text):
    """Whether a key stands twice in one object, found the plain way."""
    found = []
    json.loads(text, object_pairs_hook=lambda pairs: found.append(len(dict(pairs)) < len(pairs)) or dict(pairs))
    return any(found)


@pytest.mark.parametrize(("few", "block"), [(10**9, 1 << 17), (-1, 1 << 17), (-1, 3), (-1, 7)])
@PATCHED
@given(text=json_text())
def test_a_key_that_stands_twice_is_refused_and_no_other(few, block, monkeypatch, text):
    monkeypatch.setattr(_records, "_FEW", few)
    monkeypatch.setattr(_records, "_BLOCK", block)
    if repeats(text):
        with pytest.raises(Bad) as caught:
            parse(text.encode())
        assert caught.value.reason == "duplicate_key"
    else:
        assert parse(text.encode()) == json.loads(text)


@PATCHED
@given(text=json_text())
def test_keys_are_bounded_from_above_without_parsing_again(text):
    assert _records._colons(text.encode()) >= _records.count_keys(json.loads(text))


# --- ranges of lines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [2, 3, 1 << 20])
@PATCHED
@given(
    data=st.lists(st.sampled_from([b"\n", b"a", b"bc", b"\r\n", b" ", b"xyzxyzxyz"]), max_size=20).map(b"".join),
    cuts=st.lists(st.integers(1, 60), max_size=6),
)
def test_ranges_that_meet_share_no_line_and_lose_none(chunk, tmp_path, monkeypatch, data, cuts):
    monkeypatch.setattr(_files, "_CHUNK", chunk)
    path = Path(tmp_path, "log.jsonl")
    path.write_bytes(data)
    edges = [0, *sorted({cut for cut in cuts if cut < len(data)}), len(data)]
    found = [line for start, stop in pairwise(edges) for line in lines(path, start=start, stop=stop)]
    assert found == list(lines(path))
    plain = [line for line in data.split(b"\n") if line.strip()]
    assert [line.data for line in found if isinstance(line, Record)] == [line.rstrip(b"\r\n") for line in plain]


# --- browser-use's items ------------------------------------------------------------------------------------


def plain_page(state, place):
    made = []
    for i, item in enumerate(take(state, "items", list, place) or []):
        here = f"{place}.items[{i}]"
        text, depth = take(item, "text", str, here) or "", take(item, "depth", int, here) or 0
        mark = "" if take(item, "is_text_only", bool, here) else f"[{take(item, 'index', int, here)}] "
        made.append("  " * min(depth, 64) + mark + text)
    return "\n".join(made)


VALUE = st.sampled_from([None, True, False, 0, 3, -1, 99, "text", 1.5, [], {}])
ITEM = st.one_of(
    st.fixed_dictionaries(
        {
            "index": st.integers(0, 9),
            "text": st.text(max_size=3),
            "is_text_only": st.booleans(),
            "depth": st.integers(0, 80),
        }
    ),
    st.dictionaries(st.sampled_from(["index", "text", "is_text_only", "depth"]), VALUE),
    VALUE,
)


def outcome(function, state):
    try:
        return function(state, "state")
    except Bad as bad:
        return bad.reason, bad.message


@settings(max_examples=500, deadline=None)
@given(items=st.lists(ITEM, max_size=3))
def test_a_page_of_items_is_read_as_item_by_item(items):
    assert outcome(_browser_use._page, {"items": items}) == outcome(plain_page, {"items": items})

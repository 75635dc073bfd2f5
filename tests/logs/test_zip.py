"""Zip files built to do harm, or only damaged: each has its reason, and memory stays bounded."""

import io
import os
import stat
import struct
import tracemalloc
import zipfile
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offline_lm.logs import _zip
from offline_lm.logs._records import Bad
from offline_lm.logs._zip import Archive


def pack(members, method=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


def reason(path, data, name=None):
    """The reason for which the zip, or its member, is refused."""
    path.write_bytes(data)
    with pytest.raises(Bad) as caught, Archive(path) as archive:
        archive.read(name or archive.names[0])
    assert caught.value.message
    return caught.value.reason


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.zip"


def test_an_honest_zip(path):
    path.write_bytes(pack([("a/trace.trace", b"one"), ("b", b"two" * 1000), ("a/", b"")]))
    with Archive(path) as archive:
        assert archive.names == ["a/trace.trace", "b", "a/"]
        assert (archive.read("a/trace.trace"), archive.read("b")) == (b"one", b"two" * 1000)


@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "/etc/passwd", "C:\\x", "c:x", "..\\x", "a\\..\\x", "\\\\host\\x", "..", "a\0/../b"]
)
def test_names_that_lead_out(path, name):
    data = pack([("x" * len(name), b"1")]).replace(b"x" * len(name), name.encode())
    assert reason(path, data) == "path_traversal"


def test_a_name_with_dots_is_no_traversal(path):
    path.write_bytes(pack([("a..b/c..", b"1")]))
    with Archive(path) as archive:
        assert archive.read("a..b/c..") == b"1"


def test_one_name_twice(path):
    assert reason(path, pack([("aa", b"1"), ("bb", b"2")]).replace(b"bb", b"aa")) == "duplicate_member"


def test_a_symbolic_link(path):
    link = zipfile.ZipInfo("trace.trace")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    assert reason(path, pack([(link, b"/etc/passwd")])) == "zip_link"


def test_a_password(path):
    data = bytearray(pack([("a", b"secret")]))
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.find(signature) + flags] |= 1
    assert reason(path, bytes(data)) == "zip_encrypted"


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions(path, method):
    assert reason(path, pack([("a", b"x" * 100)], method)) == "zip_method"


def test_a_bomb_of_300_mb(path):
    """It is 300 KB long; what is held while it is read is the part below the bounds."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a", "w", force_zip64=True) as out:
        for _ in range(300):
            out.write(bytes(1 << 20))
    data = buffer.getvalue()
    assert len(data) < 400_000
    assert reason(path, data) == "too_large"  # by what it declares
    at = data.rfind(b"PK\x01\x02")
    small = bytearray(data)
    small[at + 24 : at + 28] = struct.pack("<L", 200 << 20)  # it declares 200 MB, below the bound
    tracemalloc.start()
    assert reason(path, bytes(small)) == "zip_bomb"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


def test_the_total_of_all_members(path, monkeypatch):
    monkeypatch.setattr(_zip, "MAX_TOTAL", 5000)
    path.write_bytes(pack([(str(i), os.urandom(2000)) for i in range(3)]))
    with Archive(path) as archive:
        assert len(archive.read("0") + archive.read("1")) == 4000
        with pytest.raises(Bad, match="more than") as caught:
            archive.read("2")
    assert caught.value.reason == "zip_bomb"


def test_a_limit_of_one_member(path):
    path.write_bytes(pack([("a", b"12345")]))
    with Archive(path) as archive, pytest.raises(Bad, match="at most 4") as caught:
        archive.read("a", 4)
    assert caught.value.reason == "too_large"


def test_entries_that_share_bytes(path):
    """Each entry of the directory points to the same data, so a small file would give its content many times."""
    data = bytearray(pack([("a", b"1" * 50), ("b", b"2" * 50)]))
    second = data.rfind(b"PK\x01\x02")
    data[second + 42 : second + 46] = struct.pack("<L", 0)
    assert reason(path, bytes(data), "b") == "zip_bomb"


def test_a_zip_in_a_zip_stays_closed(path):
    inner = pack([("b", bytes(1 << 20))])
    path.write_bytes(pack([("a.zip", inner)]))
    with Archive(path) as archive:
        assert archive.read("a.zip") == inner


def zip64(claimed):
    """An entry whose sizes and place stand in a zip64 field, with a false length."""
    data = bytearray(pack([("a", b"12345")], zipfile.ZIP_STORED))
    at = data.rfind(b"PK\x01\x02")
    end = data.rfind(b"PK\x05\x06")
    data[at + 24 : at + 28] = b"\xff" * 4
    data[at + 30 : at + 32] = struct.pack("<H", 12)
    data[end:end] = struct.pack("<HHQ", 1, 8, claimed)
    data[end + 24 : end + 28] = struct.pack("<L", end + 12 - at)
    return bytes(data)


@pytest.mark.parametrize(("claimed", "why"), [(2**62, "too_large"), (3, "damaged_file"), (9, "damaged_file")])
def test_zip64_lengths_that_lie(path, claimed, why):
    assert reason(path, zip64(claimed)) == why


def test_a_directory_that_is_too_long(path, monkeypatch):
    monkeypatch.setattr(_zip, "_MAX_DIRECTORY", 1000)
    assert reason(path, pack([(f"{i:0100}", b"") for i in range(20)])) == "too_large"


@pytest.mark.parametrize("cut", [0, 1, 10, 40, 80])
def test_a_zip_that_was_cut(path, cut):
    data = pack([("a", b"12345")])
    assert reason(path, data[: len(data) - 1 - cut] if cut < 80 else b"") == "damaged_file"


def test_a_flipped_bit(path):
    data = bytearray(pack([("a", b"12345")], zipfile.ZIP_STORED))
    data[data.find(b"12345")] ^= 1
    assert reason(path, bytes(data)) == "damaged_file"


def test_a_file_that_is_not_there(path):
    with pytest.raises(Bad, match="cannot be opened") as refused:
        Archive(path)
    assert refused.value.reason == "unreadable_file"


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=8)), max_size=6), st.integers(0, 400))
def test_no_bytes_crash_it(path, changes, cut):
    data = bytearray(pack([("trace.trace", b'{"a": 1}'), ("b", b"x" * 300)]))
    for at, bytes_ in changes:
        data[at : at + len(bytes_)] = bytes_
    path.write_bytes(bytes(data[: len(data) - cut // 20] if cut > 300 else data))
    with suppress(Bad), Archive(path) as archive:
        for name in archive.names:
            archive.read(name)

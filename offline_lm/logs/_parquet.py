"""Rows of a Parquet file in bounded memory, one at a time, as records of JSON.

A few hundred bytes of Parquet can stand for gigabytes: by compression, and by dictionaries (one long string, a million
references). So the footer's sizes are looked at before anything is read, strings stay references until the size of
their row is known, and a row or row group that is too large is refused.

A damaged footer can also abort the process that reads it (an exception in Arrow's C++ that nothing catches), and pages
can lie about their size. So a child process reads (`_child`).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from offline_lm.logs import _child
from offline_lm.logs._child import Item
from offline_lm.logs._files import MAX_BYTES, TOTAL_BYTES, Damaged, Record, open_file
from offline_lm.logs._records import MAX_DEPTH, Bad

GROUP_BYTES = TOTAL_BYTES
"""Most uncompressed bytes of a row group, by the footer."""
GROUP_VALUES = 64 << 20
"""Most values of a row group, all columns together: an encoding says a million of them in a byte."""
_ROWS = 64
_FOOTER = 1 << 20


def is_parquet(path: Path) -> bool:
    return path.name.endswith(".parquet")


def footer(path: Path) -> bytes:
    """The bytes of the footer, where column names stand as they are; empty if there is none or it is over 1 MB."""
    try:
        with open_file(path) as stream:
            size = stream.seek(0, io.SEEK_END)
            stream.seek(max(0, size - _FOOTER))
            tail = stream.read(_FOOTER)
    except Damaged:
        return b""
    if len(tail) < 12 or not tail.endswith(b"PAR1"):
        return b""
    length = int.from_bytes(tail[-8:-4], "little")
    return tail[-8 - length : -8] if length <= len(tail) - 8 else b""


def rows(path: Path) -> Iterator[Item]:
    """Every row: a Record (the index of the row, and the row as JSON without nulls), or its index and a Bad.

    Not a number is what pandas writes for null, and read so. Bytes are replaced by their hash. A file that cannot be
    read further ends with a Damaged. Refused with ``too_large``: a row group by its footer, a row by its real size.
    """
    return _child.read(path, read_rows)


def read_rows(stream: IO[bytes]) -> Iterator[Item]:
    """As `rows`, in this process: only for files that are known to be whole."""
    try:
        yield from _rows(stream)
    except MemoryError:
        yield 0, Bad("too_large", "the file needs more memory than it may have; write smaller row groups")
    except pa.ArrowException as error:
        yield Damaged(str(error)[:200])
    except OSError as error:  # Arrow's own has no errno; one of the disk has
        if error.errno is not None:
            raise
        yield Damaged(str(error)[:200])


def _rows(stream: IO[bytes]) -> Iterator[Record | tuple[int, Bad]]:
    meta = pq.read_metadata(stream)
    names = [meta.schema.column(i).path for i in range(meta.num_columns)]
    if any(name.count(".") > 2 * MAX_DEPTH for name in names):
        yield 0, Bad("too_deep", f"columns nested more than {MAX_DEPTH} levels deep; flatten them")
        return
    first = 0
    # Strings stay references into a dictionary: a list of a million equal pages is a million small numbers.
    with closing(pq.ParquetFile(stream, metadata=meta, read_dictionary=names, pre_buffer=False)) as file:
        for index in range(meta.num_row_groups):
            group = meta.row_group(index)
            values = sum(group.column(i).num_values for i in range(group.num_columns))
            if group.total_byte_size > GROUP_BYTES or values > GROUP_VALUES:
                what = f"{group.total_byte_size} bytes and {values} values uncompressed"
                limit = f"at most {GROUP_BYTES} and {GROUP_VALUES} are read; write smaller row groups"
                yield first, Bad("too_large", f"row group {index} has {what}; {limit}")
            else:
                at = first
                for batch in file.iter_batches(_ROWS, row_groups=[index], use_threads=False):
                    yield from _batch(batch, at)
                    at += batch.num_rows
            first += group.num_rows


def _batch(batch: pa.RecordBatch, first: int) -> Iterator[Record | tuple[int, Bad]]:
    for i in range(batch.num_rows):
        row = batch.slice(i, 1)
        try:
            if sum(_size(column) for column in row.columns) > MAX_BYTES:
                raise Bad("too_large", f"row {first + i} is longer than {MAX_BYTES} bytes; shorten its pages")
            data = _json(row.to_pylist()[0])
        except Bad as bad:
            yield first + i, bad
        except UnicodeDecodeError:
            yield first + i, Bad("invalid_utf8", f"row {first + i} holds text that is not UTF-8; re-encode it")
        else:
            yield Record(first + i, data, hashlib.sha256(data).hexdigest(), False)


def _size(array: pa.Array) -> int:
    """Bytes of the values once strings are written out; no dictionary is expanded for it."""
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        return _size(array.storage)
    if isinstance(array, pa.DictionaryArray):
        known = kind.value_type
        if not (pa.types.is_binary(known) or pa.types.is_string(known)):
            return array.indices.nbytes + array.dictionary.nbytes
        lengths = pc.call_function("binary_length", [array.dictionary]).cast(pa.int64())
        return array.indices.nbytes + (pc.call_function("sum", [lengths.take(array.indices)]).as_py() or 0)
    if pa.types.is_struct(kind):
        return sum(_size(child) for child in array.flatten())
    if pa.types.is_map(kind):
        return _size(array.keys) + _size(array.items)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return 8 * len(array) + _size(array.flatten())
    return array.nbytes


def _json(row: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(_without_nulls(row), default=_plain)
    except TypeError as error:
        raise Bad("bad_value", f"a value cannot be written as JSON: {error}") from None


def _without_nulls(value: Any) -> Any:
    """Parquet gives every object of a column the same keys; those that a row did not have are null."""
    if type(value) is dict:
        return {key: _without_nulls(item) for key, item in value.items() if item is not None and item == item}
    if type(value) is list:
        return [_without_nulls(item) for item in value]
    return value


def _plain(value: Any) -> str:
    if isinstance(value, bytes):
        return f"[bytes {hashlib.sha256(value).hexdigest()}]"
    return str(value)

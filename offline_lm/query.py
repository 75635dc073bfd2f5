"""``python -m offline_lm.query``: a question to the store in SQL."""

from __future__ import annotations

import bisect
import csv
import json
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import duckdb
import orjson
import pyarrow.parquet as pq
import yaml
from omegaconf import DictConfig

from offline_lm import cli, paths, udf
from offline_lm.errors import UserError
from offline_lm.store import Store
from offline_lm.store.connect import explained

_FORMATS = ("table", "csv", "json", "parquet")
_KEYS = ("store", "version", "format", "output", "rows", "json")
_ASSIGNMENT = re.compile(r"\+{0,2}[A-Za-z_][\w.@/]*=")
_PARAM = re.compile(r"^--\s*param\s+(\w+)(?:\s*=\s*(.*?))?\s*$")


def main(argv: Sequence[str] | None = None) -> int:
    texts, params, rest = split(sys.argv[1:] if argv is None else argv)

    def body(cfg: DictConfig) -> dict[str, Any] | None:
        if len(texts) != 1:
            given = "none was given" if not texts else f"{len(texts)} were given: quote the SQL as one argument"
            raise UserError(f"query takes one SQL text or FILE.sql; {given}")
        return query(cfg, texts[0], params)

    return cli.run("query", body, rest)


def split(argv: Sequence[str]) -> tuple[list[str], dict[str, str], list[str]]:
    """(SQL texts or files, parameters, what is Hydra's) of a command line: SQL may hold any character."""
    texts: list[str] = []
    params: dict[str, str] = {}
    rest: list[str] = []
    for arg in argv:
        name, _, value = arg.partition("=")
        if not _ASSIGNMENT.match(arg):
            (rest if re.match(r"-(-|h$|m$)\S*$", arg) else texts).append(arg)
        elif name in _KEYS or "." in name or name.startswith("+"):
            rest.append(arg)
        else:
            params[name] = value
    return texts, params, rest


def query(cfg: DictConfig, text: str, params: dict[str, str]) -> dict[str, Any] | None:
    """Runs one statement and prints or writes its rows; with ``json`` it returns them."""
    output = None if cfg.output is None else Path(cfg.output)
    format_ = _format(cfg.format, output)
    if type(cfg.rows) is not int or cfg.rows < 1:
        raise UserError(f"rows={cfg.rows}: a whole number from 1 is wanted")
    sql = read_sql(text)
    store = Store.open(cfg.store, cfg.version)
    with store.connect() as db:
        udf.register(db, store)
        db.execute("SET errors_as_json = true")
        with _sql_errors(sql), explained(store):
            statements = db.extract_statements(sql)
            if len(statements) != 1:
                raise UserError(f"query runs one SQL statement, {len(statements)} were given")
            values = bind(sql, statements[0].named_parameters, params, store)
            statement = statements[0]
            if format_ == "parquet" and output is not None:
                with cli.replacing(output) as beside:
                    columns = _write_parquet(db.sql(statement.query, params=values or None), beside)
                return {"columns": columns, "output": str(output)}
            result = db.execute(statement, values or None)
            if output is not None:
                with cli.replacing(output) as beside, beside.open("w", encoding="utf-8", newline="") as file:
                    _write(result, format_, file, cfg.rows)
                return {"columns": _columns(result), "output": str(output)}
            if cfg.json:
                return {"columns": _columns(result), "rows": list(_records(result))}
            _write(result, format_, sys.stdout, cfg.rows)
            return None


def read_sql(text: str) -> str:
    """``text`` itself, or what stands in the file it names; ``analysis/NAME.sql`` is found from anywhere."""
    if not text.endswith(".sql") or "\n" in text:
        return text
    given = Path(text)
    for file in (given, paths.ANALYSIS / given, paths.ANALYSIS / given.name):
        if file.is_file():
            return file.read_text(encoding="utf-8")
    known = ", ".join(sorted(file.name for file in paths.ANALYSIS.glob("*.sql")))
    raise UserError(f"no file {text}, neither here nor in {paths.ANALYSIS}; there are {known}")


def declared(sql: str) -> dict[str, str | None]:
    """Parameters declared in the comments at the head of ``sql``, with defaults (None: must be given)."""
    found: dict[str, str | None] = {}
    for line in sql.splitlines():
        if line.strip() and not line.lstrip().startswith("--"):
            break
        if match := _PARAM.match(line.strip()):
            found[match[1]] = match[2]
    return found


def bind(sql: str, wanted: set[str], given: dict[str, str], store: Store) -> dict[str, Any]:
    """Values for the parameters ``wanted`` of ``sql``: as given, else by default; ``run`` as a run id.

    Raises:
        UserError: a parameter too many or too few, or a value that is not of its default's type.
    """
    defaults = declared(sql)
    takes = f"this SQL takes {', '.join(sorted(wanted)) or 'none'}"
    if surplus := sorted(given.keys() - wanted):
        raise UserError(f"no parameter {', '.join(f'${name}' for name in surplus)}: {takes}")
    values: dict[str, Any] = {}
    missing = []
    for name in sorted(wanted):
        default = defaults.get(name)
        text = given.get(name, "latest" if name == "run" and default is None else default)
        if text is None:
            missing.append(name)
        elif name == "run":
            values[name] = store.resolve_run(text)
        else:
            values[name] = _typed(name, text, default)
    if missing:
        raise UserError(f"give {' '.join(f'{name}=VALUE' for name in missing)}: {takes}")
    return values


def _typed(name: str, text: str, default: str | None) -> Any:
    value = _scalar(text)
    kind = type(None) if default is None else type(_scalar(default))
    if kind is str:
        return text if not isinstance(value, str) else value
    if kind is float and isinstance(value, int):
        return float(value)
    if kind is not type(None) and value is not None and not isinstance(value, kind):
        raise UserError(f"{name}={text}: a value like {default} is wanted")
    return value


def _scalar(text: str) -> Any:
    """null, true, false, numbers and quoted strings as in YAML; everything else is the text itself."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return value if value is None or isinstance(value, bool | int | float | str) else text


@contextmanager
def _sql_errors(sql: str) -> Iterator[None]:
    """DuckDB's errors as one line with the place in ``sql``."""
    try:
        yield
    except duckdb.Error as error:
        kind, _, detail = str(error).partition(": ")
        try:
            fields = json.loads(detail)
        except ValueError:
            raise UserError(f"SQL: {' '.join(str(error).split())}") from error
        told = " ".join(fields["exception_message"].split())
        if own := re.search(r"^Python exception occurred while executing the UDF: UserError: (.*)", told):
            raise UserError(own[1]) from error
        message = f"SQL: {kind.removesuffix(' Error')}: {told}"
        if "position" in fields:
            before = sql.encode()[: int(fields["position"])].decode(errors="replace")
            line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
            near = sql[len(before) :].split("\n")[0][:40].strip()
            message += f" (line {line}, column {column}, at `{near}`)"
        raise UserError(message) from error


def _format(name: str | None, output: Path | None) -> str:
    suffix = "" if output is None else output.suffix.lstrip(".")
    format_ = name or (suffix if suffix in _FORMATS else "table")
    if format_ not in _FORMATS:
        raise UserError(f"format={format_}: there are {', '.join(_FORMATS)}")
    if format_ == "parquet" and output is None:
        raise UserError("format=parquet needs output=FILE")
    return format_


def _write_parquet(relation: duckdb.DuckDBPyRelation | None, file: Path) -> list[str]:
    if relation is None:
        raise UserError("this SQL statement has no rows to write")
    reader = relation.to_arrow_reader(65_536)
    with pq.ParquetWriter(file, reader.schema, compression="zstd") as writer:
        for batch in reader:
            writer.write_batch(batch)
    return reader.schema.names


def _write(result: duckdb.DuckDBPyConnection, format_: str, file: TextIO, most: int) -> None:
    if format_ == "table":
        _write_table(result, file, most)
    elif format_ == "csv":
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_columns(result))
        for row in _rows(result):
            writer.writerow(_nested(value) for value in row)
    else:
        file.write("[")
        for i, record in enumerate(_records(result)):
            file.write((",\n " if i else "\n ") + orjson.dumps(record, default=str).decode())
        file.write("\n]\n")


def _columns(result: duckdb.DuckDBPyConnection) -> list[str]:
    return [column[0] for column in result.description or []]


def _rows(result: duckdb.DuckDBPyConnection) -> Iterator[tuple[Any, ...]]:
    while rows := result.fetchmany(10_000):
        yield from rows


def _records(result: duckdb.DuckDBPyConnection) -> Iterator[dict[str, Any]]:
    columns = _columns(result)
    for row in _rows(result):
        yield dict(zip(columns, row, strict=True))


def _nested(value: Any) -> Any:
    return orjson.dumps(value, default=str).decode() if isinstance(value, list | dict) else value


def _write_table(result: duckdb.DuckDBPyConnection, file: TextIO, most: int) -> None:
    rows = result.fetchmany(most)
    more = bool(result.fetchone()) if len(rows) == most else False
    columns = _columns(result)
    numeric = [all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(columns))]
    cells = [[_cell(value) for value in row] for row in rows]
    natural = [max(len(name), *(len(row[i]) for row in cells), 1) for i, name in enumerate(columns)]
    # A number cut short would be another number: only text and headers give way.
    least = [max(8, *(len(row[i]) for row in cells)) if numeric[i] and cells else 8 for i in range(len(columns))]
    widths = _fit(natural, least, shutil.get_terminal_size((120, 40)).columns)

    def line(row: Sequence[str]) -> str:
        parts = [_short(cell, width) for cell, width in zip(row, widths, strict=True)]
        aligned = [
            part.rjust(width) if right else part.ljust(width)
            for part, width, right in zip(parts, widths, numeric, strict=True)
        ]
        return "  ".join(aligned).rstrip() + "\n"

    file.write(line(columns))
    file.write("  ".join("-" * width for width in widths) + "\n")
    file.writelines(map(line, cells))
    if more:
        file.write(f"(the first {most} rows; rows=N or format=csv for more)\n")
    else:
        file.write(f"({len(rows)} row{'' if len(rows) == 1 else 's'})\n")


def _cell(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(str(_nested(value)).split())


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _fit(widths: list[int], least: list[int], terminal: int) -> list[int]:
    """``widths`` cut from the widest down until the line fits, but none below its ``least``."""

    def capped(cap: int) -> list[int]:
        return [min(width, max(cap, low)) for width, low in zip(widths, least, strict=True)]

    room = terminal - 2 * (len(widths) - 1)
    caps = range(8, max([8, *widths]) + 1)
    # bisect for the first cap that is too wide: widths grow with the cap
    too_wide = bisect.bisect_left(caps, True, key=lambda cap: sum(capped(cap)) > room)
    return capped(caps[max(too_wide - 1, 0)])


if __name__ == "__main__":
    sys.exit(main())

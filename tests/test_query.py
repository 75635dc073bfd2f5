import csv
import io
import json
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest

from offline_lm import query
from offline_lm.store import Store
from offline_lm.store.ingest import add
from offline_lm.types import Episode, Step


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store.create(tmp_path / "store")
    store.append("metrics", [{"run_id": "a=b, c", "step": i, "name": "loss", "value": i / 3} for i in range(3)])
    return store


@pytest.fixture
def ask(store, capsys):
    """(exit code, stdout, stderr) of a query."""

    def ask(*argv):
        capsys.readouterr()
        return (query.main(argv), *capsys.readouterr())

    return ask


def test_sql_arrives_intact(ask):
    code, out, _ = ask("SELECT step FROM metrics WHERE run_id = 'a=b, c' AND step IN (1, 2) ORDER BY 1", "format=csv")
    assert code == 0
    assert out == "step\n1\n2\n"


def test_a_table_fits_the_terminal_and_keeps_numbers_whole(ask, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    code, out, _ = ask("SELECT 123456789012 AS n, repeat('long text ', 20) AS t, NULL AS x, 1/3 AS f")
    assert code == 0
    header, rule, row, count = out.splitlines()
    assert max(map(len, (header, rule, row))) <= 40
    assert row.startswith("123456789012  long te")
    assert "…" in row
    assert "null" in row
    assert row.endswith("0.3333")
    assert count == "(1 row)"


def test_a_table_says_when_it_stops_early(ask):
    _, out, _ = ask("FROM metrics", "rows=2")
    assert out.splitlines()[-1] == "(the first 2 rows; rows=N or format=csv for more)"
    _, out, _ = ask("FROM metrics", "rows=3")
    assert out.splitlines()[-1] == "(3 rows)"


def test_json(ask):
    _, out, _ = ask("SELECT step, [value] AS v FROM metrics WHERE step = 0", "format=json")
    assert json.loads(out) == [{"step": 0, "v": [0.0]}]
    _, out, _ = ask("SELECT step FROM metrics ORDER BY 1", "json=true")
    assert json.loads(out) == {"columns": ["step"], "rows": [{"step": 0}, {"step": 1}, {"step": 2}]}


def test_csv_quotes_what_it_must(ask):
    _, out, _ = ask("SELECT 'a,\"b\"' AS t, [1, 2] AS l", "format=csv")
    assert list(csv.reader(io.StringIO(out))) == [["t", "l"], ['a,"b"', "[1,2]"]]


def test_parquet_and_files(ask, tmp_path):
    assert ask("FROM metrics", "output=out (1), x.parquet")[0] == 0
    assert pq.read_table(tmp_path / "out (1), x.parquet").num_rows == 3
    assert ask("SELECT 1 AS a", "output=a.csv")[0] == 0
    assert (tmp_path / "a.csv").read_text() == "a\n1\n"
    assert ask("SELECT 1/0::INT AS a, error('no')", "output=a.csv")[0] == 2
    assert (tmp_path / "a.csv").read_text() == "a\n1\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "out (1), x.parquet", "store"]


def test_parameters(ask, tmp_path):
    (tmp_path / "q.sql").write_text("-- a question\n-- param k = 2\n-- param name\nSELECT $k + 1 AS k, $name AS n")
    assert ask("q.sql", "name=a=b", "format=csv")[1] == "k,n\n3,a=b\n"
    assert ask("q.sql", "name=17", "k=4", "format=csv")[1] == "k,n\n5,17\n"
    code, _, err = ask("q.sql")
    assert (code, err) == (2, "error: give name=VALUE: this SQL takes k, name\n")
    code, _, err = ask("q.sql", "name=x", "kk=3")
    assert (code, err) == (2, "error: no parameter $kk: this SQL takes k, name\n")
    code, _, err = ask("q.sql", "name=x", "k=many")
    assert (code, err) == (2, "error: k=many: a value like 2 is wanted\n")


def test_run_is_resolved(ask, store):
    assert "offline_lm.fit" in ask("SELECT $run AS r")[2]
    store.append("runs", [{"run_id": "r1", "status": "finished"}])
    assert ask("SELECT $run AS r", "format=csv")[1] == "r\nr1\n"
    assert ask("SELECT $run AS r", "run=latest", "format=csv")[1] == "r\nr1\n"
    assert "no run `r2`" in ask("SELECT $run AS r", "run=r2")[2]


def test_a_question_of_ours_is_found_from_anywhere(ask):
    for name in ("analysis/log_quality.sql", "log_quality.sql"):
        assert ask(name)[0] == 0
    code, _, err = ask("analysis/nope.sql")
    assert code == 2
    assert "log_quality.sql" in err


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELEC 1", 'SQL: Parser: syntax error at or near "SELEC" (line 1, column 1, at `SELEC 1`)'),
        ("SELECT 'é',\n  nope FROM metrics", "(line 2, column 3, at `nope FROM metrics`)"),
        ("FROM nope", "SQL: Catalog: Table with name nope does not exist!"),
        ("SELECT 'a'::INT", "SQL: Conversion:"),
        ("SELECT 1; SELECT 2", "query runs one SQL statement, 2 were given"),
        ("", "query runs one SQL statement, 0 were given"),
    ],
)
def test_sql_errors_are_one_line(ask, sql, message):
    code, _, err = ask(sql)
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "none was given"),
        (["SELECT", "1"], "quote the SQL as one argument"),
        (["SELECT 1", "format=xml"], "format=xml: there are table, csv, json, parquet"),
        (["SELECT 1", "format=parquet"], "needs output=FILE"),
        (["SELECT 1", "rows=many"], "rows=many"),
        (["SELECT 1", "store=nowhere"], "no store at"),
        (["SELECT 1", "output=no/such/folder.csv"], "cannot be written"),
    ],
)
def test_mistakes(ask, argv, message):
    code, _, err = ask(*argv)
    assert code == 2
    assert message in err


def test_a_corrupt_file_is_named(ask, store):
    (file,) = store.files("metrics")
    size = Path(file).stat().st_size
    with open(file, "r+b") as broken:  # the footer stands, a page does not
        broken.seek(4)
        broken.write(b"\xff" * (size // 8))
    code, _, err = ask("FROM metrics")
    assert code == 2
    assert file in err


def test_the_store_can_come_from_the_environment(ask, tmp_path, monkeypatch):
    Store.create(tmp_path / "other")
    monkeypatch.setenv("OFFLINE_LM_STORE", str(tmp_path / "other"))
    assert ask("SELECT count(*) AS n FROM metrics", "format=csv")[1] == "n\n0\n"
    assert ask("SELECT count(*) AS n FROM metrics", "format=csv", "store=store")[1] == "n\n3\n"


def test_macros_take_parameters(ask):
    assert ask("SELECT count(*) AS n FROM discounted_returns($g)", "g=0.9", "format=csv")[1] == "n\n0\n"


def test_duckdb_still_reports_the_place_as_we_read_it():
    with duckdb.connect() as db, pytest.raises(duckdb.Error, match='"position":"7"'):
        db.execute("SET errors_as_json = true").execute("SELECT nope")


def test_a_store_as_it_was(ask, store):
    for name in ("1", "2"):
        step = Step(step=0, observation="o", action=name)
        add(store, [Episode(source="test", native_id=name, steps=(step,))])
    store.append("runs", [{"run_id": "q-1", "status": "finished", "store_versions": json.dumps({"episodes": 1})}])
    counts = {}
    for version in ("0", "1", "q-1", "null"):
        _, out, _ = ask("SELECT count(*) FROM steps", "format=csv", f"version={version}")
        counts[version] = out.splitlines()[-1]
    assert counts == {"0": "0", "1": "1", "q-1": "1", "null": "2"}
    code, _, err = ask("SELECT 1", "version=7")
    assert code == 2
    assert "version 7 of episodes does not exist; the newest is 2" in err
    assert "no run `nobody`" in ask("SELECT 1", "version=nobody")[2]

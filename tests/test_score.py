import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tqdm import tqdm

from offline_lm import score
from offline_lm.models import backbone
from offline_lm.models.critic import Critic, Score
from offline_lm.models.heads import Heads
from offline_lm.store import Store

PAGES = [f"shop page {i}\n[1] red mug ${i}\n[2] blue cup ${2 * i}\n" + "more words " * (i % 7) for i in range(7)]


def _save(folder, *, has_q=True, max_tokens=256):
    model, tokenizer = backbone.tiny(PAGES, vocab_size=300, width=32, layers=2, heads=2)
    torch.manual_seed(1)
    heads = Heads(32, hidden=16)
    with torch.no_grad():  # an untrained model hardly tells texts apart; equal numbers must mean something
        for name, weight in model.named_parameters():
            if "o_proj" in name:
                weight.mul_(100)
        for head in (heads.v, heads.q):
            head.weights[-1].mul_(30)
    Critic(model, tokenizer, heads, {"max_tokens": max_tokens, "history": 2, "dtype": "float32", "has_q": has_q}).save(
        folder, backbone_path=None
    )
    return folder


@pytest.fixture(scope="module")
def critic_folder(tmp_path_factory):
    return _save(tmp_path_factory.mktemp("runs") / "r1")


@pytest.fixture
def run(critic_folder, tmp_path, monkeypatch, capsys):
    """(exit code, last line of stdout or the error) of a scoring with the tiny critic."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        code = score.main([f"run={critic_folder}", "threads=1", *argv])
        out, err = capsys.readouterr()
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) == (code != 0)
        return code, out.splitlines()[-1] if code == 0 else errors[0]

    return run


def _pairs(n):
    return [
        {
            "id": 1000 - i,
            "goal": f"Buy mug {i % 3}",
            "observation": PAGES[i % 7],
            "action": f"click[{i % 4}]",
            "extra": {"n": i},
        }
        for i in range(n)
    ]


def _states(n):
    rows = []
    for i in range(n):
        options = [{"action": f"click[{j}]", "logprob": -1.0} for j in range(i % 4)]
        rows.append({"goal": "Buy", "observation": PAGES[i % 7], "history": ["back"] * (i % 3), "candidates": options})
    rows[1]["candidates"] = None
    return rows


def _expected(folder, rows):
    """(v, q) of every row, scored in one chunk."""
    return [(score.v, score.q or []) for score in Critic.from_pretrained(folder).score(rows, chunk=10_000)]


@pytest.mark.parametrize("n", [1, 256, 257, 600])
def test_pairs_of_a_parquet_file(run, critic_folder, n):
    rows = _pairs(n)
    pq.write_table(pa.Table.from_pylist(rows), "in.parquet", row_group_size=100)
    code, last = run("input=in.parquet", "output=out.parquet", "json=true")
    assert code == 0
    told = json.loads(last)
    assert (told["rows"], told["output"]) == (n, "out.parquet")
    assert told["states_per_s"] > 0
    table = pq.read_table("out.parquet")
    assert table.column_names == ["id", "goal", "observation", "action", "extra", "v", "q", "advantage"]
    assert table.drop_columns(["v", "q", "advantage"]).to_pylist() == rows
    wanted = _expected(critic_folder, rows)
    assert len({round(v, 3) for v, _ in wanted}) > min(n, 7) / 2
    assert table["v"].to_pylist() == pytest.approx([v for v, _ in wanted], abs=1e-5)
    assert table["q"].to_pylist() == pytest.approx([q for _, [q] in wanted], abs=1e-5)
    assert table["advantage"].to_pylist() == pytest.approx([q - v for v, [q] in wanted], abs=1e-5)


def test_candidates_give_lists_in_their_order(run, critic_folder):
    rows = _states(300)
    pq.write_table(pa.Table.from_pylist(rows), "in.parquet")
    assert run("input=in.parquet", "output=out.parquet")[0] == 0
    table = pq.read_table("out.parquet")
    assert table.schema.field("q").type == pa.list_(pa.float64())
    for row, (v, q), got in zip(rows, _expected(critic_folder, rows), table.to_pylist(), strict=True):
        assert got["v"] == pytest.approx(v, abs=1e-5)
        if row["candidates"] is None:
            assert got["q"] is None
            assert got["advantage"] is None
        else:
            assert got["q"] == pytest.approx(q, abs=1e-5)
            assert got["advantage"] == pytest.approx([x - v for x in q], abs=1e-5)
            assert len(got["q"]) == len(row["candidates"])
    # the same candidates the other way round
    turned = [{**row, "candidates": (row["candidates"] or [])[::-1]} for row in rows]
    pq.write_table(pa.Table.from_pylist(turned), "in.parquet")
    assert run("input=in.parquet", "output=turned.parquet")[0] == 0
    other = pq.read_table("turned.parquet")["q"].to_pylist()
    assert other[3] == pytest.approx(table["q"].to_pylist()[3][::-1], abs=1e-5)
    assert max(table["q"].to_pylist()[3]) - min(table["q"].to_pylist()[3]) > 1e-3


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_lines_stay_as_they_are(run, critic_folder, suffix):
    rows = _pairs(258)
    rows[3] = {"goal": "é", "observation": PAGES[0], "candidates": ["click[1]", {"action": "back"}], "big": 2**70}
    rows[4] = {"goal": "Buy", "messages": [{"role": "user", "content": "é"}], "response": "click[2]"}
    rows[5] = {"goal": "Buy", "observation": PAGES[2], "action": "click[1]", "candidates": []}
    lines = [json.dumps(row).encode() for row in rows]
    lines[0] = b"\xef\xbb\xbf" + lines[0]
    opener = gzip.open if suffix == ".jsonl.gz" else open
    with opener(f"in{suffix}", "wb") as file:
        file.write(b"\n\n".join(lines))  # blank lines, and no line end at the end
    assert run(f"input=in{suffix}", f"output=out{suffix}")[0] == 0
    with opener(f"out{suffix}", "rb") as file:
        written = file.read().splitlines()
    assert len(written) == len(rows)
    assert written[3].startswith(lines[3][:-1] + b',"v":')
    for (v, q), row, line in zip(_expected(critic_folder, rows), rows, written, strict=True):
        got = json.loads(line)
        assert {key: got[key] for key in row} == row
        wanted = q if row.get("candidates") else [] if row.get("candidates") == [] else q[0]
        assert got["v"] == pytest.approx(v, abs=1e-5)
        assert got["q"] == pytest.approx(wanted, abs=1e-5)


def test_a_critic_of_states_alone_gives_null(run, tmp_path):
    _save(tmp_path / "v_only", has_q=False)
    pq.write_table(pa.Table.from_pylist(_pairs(2)), "in.parquet")
    assert run("run=./v_only", "input=in.parquet", "output=out.parquet")[0] == 0
    table = pq.read_table("out.parquet")
    assert table["v"].null_count == 0
    assert (table["q"].null_count, table["advantage"].null_count) == (2, 2)
    assert table.schema.field("q").type == pa.float64()
    pq.write_table(pa.Table.from_pylist(_states(3)).drop_columns("history"), "in.parquet")
    assert run("run=./v_only", "input=in.parquet", "output=out.parquet")[0] == 0
    assert pq.read_table("out.parquet")["q"].to_pylist() == [None] * 3


def test_memory_is_bounded_whatever_the_row_group(tmp_path):
    """One row group of 150 MB of text: what is held at any time is a part of it."""
    n, page = 3000, "x" * 50_000
    rows = pa.table({"goal": ["g"] * n, "observation": [f"{i}{page}" for i in range(n)], "action": ["a"] * n})
    pq.write_table(rows, tmp_path / "in.parquet", use_dictionary=False, compression="none", row_group_size=n)
    del rows
    held = []

    def scores(states):
        for i, state in enumerate(states):
            assert state["observation"].startswith(f"{i}x")
            held.append(pa.total_allocated_bytes() - before)
            yield Score(0.0, [1.0])

    before = pa.total_allocated_bytes()
    with tqdm(disable=True) as bar:
        done = score.score_parquet(tmp_path / "in.parquet", tmp_path / "out.parquet", scores, True, bar)
    assert done == n
    assert max(held) < 75e6
    assert pq.read_table(tmp_path / "out.parquet", columns=["q"])["q"].to_pylist() == [1.0] * n


def test_an_empty_file_gives_an_empty_file(run):
    pq.write_table(pa.Table.from_pylist(_pairs(1)).slice(0, 0), "in.parquet")
    assert run("input=in.parquet", "output=out.parquet")[0] == 0
    table = pq.read_table("out.parquet")
    assert table.num_rows == 0
    assert table.column_names[-3:] == ["v", "q", "advantage"]
    open("in.jsonl", "w").close()
    assert run("input=in.jsonl", "output=out.jsonl")[0] == 0
    assert os.path.getsize("out.jsonl") == 0


def test_runs_are_found_by_name_and_folder(run, critic_folder, tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps(_pairs(1)[0]) + "\n")
    store = Store.create(tmp_path / "store")
    rows = ["input=in.jsonl", "output=out.jsonl"]
    assert "no run in" in run("run=latest", *rows)[1]
    store.append("runs", [{"run_id": "r1", "status": "finished", "run_dir": str(critic_folder)}])
    for name in ("latest", "r1"):
        assert run(f"run={name}", *rows)[0] == 0
    assert "known, newest first: r1 (finished)" in run("run=r2", *rows)[1]
    assert "holds no critic" in run("run=./nowhere", *rows)[1]
    assert "no store at" in run("run=r1", "store=elsewhere", *rows)[1]
    store.append("runs", [{"run_id": "r3", "status": "finished", "run_dir": str(tmp_path / "gone")}])
    code, error = run("run=latest", *rows)
    assert code == 2
    assert "run r3 (finished) is gone" in error
    assert str(tmp_path / "gone") in error
    store.run_dir("r3").parent.mkdir()  # the folder that a moved store brought along
    store.run_dir("r3").symlink_to(critic_folder)
    assert run("run=r3", *rows)[0] == 0


GOOD = {"goal": "Buy", "observation": "x", "action": "a"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD | {"v": 1.0}], "has v already"),
        ([{"goal": "Buy", "action": "a"}], "no observation and no messages"),
        ([{"observation": "x", "action": "a"}], "no goal"),
        ([{"goal": "Buy", "observation": "x"}], "no action, response or candidates"),
        ([GOOD, GOOD | {"observation": None}], "input record 1"),
        ([GOOD | {"observation": 3}], "input record 0: `observation` is 3"),
        ([GOOD | {"action": 3}], "input record 0: `action` is 3"),
        ([GOOD | {"candidates": [3]}], "input record 0: a candidate"),
        ([GOOD | {"candidates": "click"}], "input record 0: `candidates`"),
        ([GOOD | {"history": [1]}], "input record 0: `history`"),
        ([GOOD] * 300 + [GOOD | {"goal": "many words " * 300}], "input record 300: goal and last past action exceed"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_bad_rows_are_named(run, tmp_path, rows, message, suffix):
    file = tmp_path / f"in{suffix}"
    if suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    code, error = run(f"input={file}", f"output=out{suffix}")
    assert code == 2
    assert str(file) in error
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == [file.name]  # no half output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{nope}\n", "line 1 is not JSON"),
        (b"\n[1]\n", "line 2 is no JSON object"),
        (b'{"goal": "\xff"}', "line 1 is not JSON"),
    ],
)
def test_bad_lines_are_named(run, tmp_path, content, message):
    (tmp_path / "in.jsonl").write_bytes(content)
    code, error = run("input=in.jsonl", "output=out.jsonl")
    assert (code, message in error, "in.jsonl" in error) == (2, True, True)


def test_damaged_files_are_named(run, tmp_path):
    pq.write_table(pa.Table.from_pylist(_pairs(50)), "in.parquet", compression="none")
    whole = (tmp_path / "in.parquet").read_bytes()
    half = len(whole) // 2
    # no footer; a page overwritten under a footer that stands; nothing at all
    for data in (whole[:half], whole[:4] + b"\xff" * half + whole[4 + half :], b""):
        (tmp_path / "in.parquet").write_bytes(data)
        code, error = run("input=in.parquet", "output=out.parquet")
        assert code == 2
        assert "in.parquet: it cannot be read" in error
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode() * 100)[:40])
    assert "in.jsonl.gz: it cannot be read" in run("input=in.jsonl.gz", "output=out.jsonl.gz")[1]
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["input=none.parquet", "output=out.parquet"], "input=none.parquet: no such file"),
        (["input=in.csv", "output=out.csv"], "input=in.csv: its name must end in"),
        (["input=in.jsonl", "output=out.parquet"], "output=out.parquet: input is JSONL"),
        (["input=in.jsonl", "output=no/such/out.jsonl"], "output=no/such/out.jsonl cannot be written"),
        (["input=in.jsonl", "output=out.jsonl", "device=abacus"], "device=abacus"),
        (["input=in.jsonl", "output=out.jsonl", "batch_tokens=no"], "batch_tokens=no"),
        (["input=in.jsonl"], "output= must be given"),
    ],
)
def test_mistakes(run, tmp_path, argv, message):
    (tmp_path / "in.jsonl").write_text(json.dumps(GOOD) + "\n")
    code, error = run(*argv)
    assert code == 2
    assert message in error


def test_an_old_output_outlives_a_run_that_fails(run, tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps(GOOD) + "\n" + "{}\n")
    (tmp_path / "out.jsonl").write_text("old")
    assert run("input=in.jsonl", "output=out.jsonl")[0] == 2
    assert (tmp_path / "out.jsonl").read_text() == "old"

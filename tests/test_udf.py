"""V and Q in SQL: the numbers of `score` and of `fit`, whole vectors, each state once, and clear mistakes."""

import csv
import io
import json
import shutil
import subprocess
import sys
import threading
from typing import Any

import duckdb
import orjson
import pyarrow as pa
import pytest
import torch

import offline_lm
from offline_lm import fit, ingest, query, udf
from offline_lm.envs.shop import Site, Task, record
from offline_lm.models import backbone
from offline_lm.models.critic import Critic
from offline_lm.store import Store

SMALL = [
    *("model=hf", "optim.batch_size=64", "optim.steps=1", "threads=1", "logger=none", "baselines=false"),
    *("data.history=2", "data.max_tokens=300"),
]


def save_backbone(folder, texts):
    """A small model in which texts make a difference though it is untrained: equal numbers must mean something."""
    model, tokenizer = backbone.tiny(texts, vocab_size=400, width=32, layers=2, heads=2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "o_proj" in name:
                weight.mul_(100)
    backbone.save(model, tokenizer, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store with two runs: `q` of q_mc and `v` of critic_mc, which has no Q."""
    folder = tmp_path_factory.mktemp("udf")
    episodes: list[dict[str, Any]] = list(record([Task(Site.draw(3), i) for i in range(4)], 3))
    episodes[0]["steps"][1]["url"] = "http://shop/1"
    episodes[1]["steps"][1]["response"] = f"I think {episodes[1]['steps'][1]['action']}"
    episodes[1]["steps"][2]["observation_error"] = "no such button"
    episodes[2] |= {"goal": "a mug " * 500}  # no step of it can be read
    episodes[3] |= {"goal": None, "start_url": "http://shop"}
    (folder / "log.jsonl").write_bytes(b"\n".join(orjson.dumps(e) for e in episodes))
    assert ingest.main([f"path={folder / 'log.jsonl'}", f"store={folder / 'store'}"]) == 0
    path = folder / "backbone"
    save_backbone(path, [step["observation"] for e in episodes for step in e["steps"]])
    for algo in ("critic_mc", "q_mc"):
        assert (
            fit.main([f"data.store={folder / 'store'}", f"algo={algo}", f"model.path={folder / 'backbone'}", *SMALL])
            == 0
        )
    return folder / "store"


@pytest.fixture(scope="module")
def runs(folder):
    with Store.open(folder).connect() as db:
        return dict(db.execute("SELECT algo, run_id FROM runs").fetchall())


@pytest.fixture
def db(folder):
    with offline_lm.connect(folder) as db:
        yield db


@pytest.fixture
def passes(monkeypatch):
    """States that every call hands to the critic."""
    seen = []
    whole = Critic.score_chunk

    def counted(self, states, **options):
        states = list(states)
        seen.append(len(states))
        return whole(self, states, **options)

    monkeypatch.setattr(Critic, "score_chunk", counted)
    return seen


def test_stored_steps_have_the_values_that_fit_wrote(db, runs):
    ours = "scored_steps('latest') AS o JOIN \"values\" AS w USING (episode_id, step)"
    rows = db.execute(f"SELECT o.v, w.v, o.q, w.q FROM {ours} WHERE w.run_id = ?", [runs["q_mc"]]).fetchall()
    ((steps, acted),) = db.execute("SELECT count(*), count(action) FROM steps").fetchall()
    assert len(rows) == steps
    for v, written_v, q, written_q in rows:
        assert v == (None if written_v is None else pytest.approx(written_v, abs=1e-5))
        assert q == (None if written_q is None else pytest.approx(written_q, abs=1e-5))
    unreadable = sum(v is None for v, *_ in rows)
    assert 0 < unreadable < steps / 2
    assert unreadable < sum(q is None for _, _, q, _ in rows) < steps - acted / 2  # final observations have V alone
    assert len({round(q, 4) for _, _, q, _ in rows if q is not None}) > 20


def test_url_and_history_are_read(db, runs):
    """The functions with every argument give what `fit` wrote, where nothing else was logged."""
    sql = """
        SELECT s.episode_id, s.step, w.v, w.q,
               v_value('latest', e.goal, s.observation, s.url, past),
               q_value('latest', e.goal, s.observation, s.action, history := past, url := s.url),
               v_value('latest', e.goal, s.observation)
        FROM (SELECT *, list(action) OVER (PARTITION BY episode_id ORDER BY step
                                           ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS past FROM steps) AS s
        JOIN episodes AS e USING (episode_id)
        JOIN "values" AS w ON w.episode_id = s.episode_id AND w.step = s.step AND w.run_id = $run
        WHERE s.action IS NOT NULL AND s.observation_error IS NULL AND e.goal IS NOT NULL
        QUALIFY NOT bool_or(s.response IS NOT NULL) OVER (PARTITION BY s.episode_id)
    """
    rows = db.execute(sql, {"run": runs["q_mc"]}).fetchall()
    assert len(rows) > 20
    for *_, v, q, by_v, by_q, plain in rows:
        assert by_v == (None if v is None else pytest.approx(v, abs=1e-5))
        assert by_q == (None if q is None else pytest.approx(q, abs=1e-5))
        assert (plain is None) == (v is None)
    assert sum(plain != pytest.approx(v, abs=1e-4) for *_, v, _, _, _, plain in rows if v is not None) > 5


def test_the_numbers_are_those_of_score(db, folder, runs):
    read = "run_id = $run AND q IS NOT NULL AND goal IS NOT NULL"
    table = db.sql(f"SELECT goal, observation, action FROM run_values WHERE {read}", params={"run": runs["q_mc"]})
    states = table.to_arrow_table().to_pylist()
    db.register("pairs", pa.Table.from_pylist([{**s, "i": i} for i, s in enumerate(states)]))
    got = db.execute(
        "SELECT v_value('latest', goal, observation), q_value('latest', goal, observation, action)"
        " FROM pairs ORDER BY i"
    ).fetchall()
    wanted = [(s.v, s.q[0]) for s in Critic.from_pretrained(folder / "runs" / runs["q_mc"]).score(states) if s.q]
    assert len(got) == len(wanted) == len(states)
    assert [v for v, _ in got] == pytest.approx([v for v, _ in wanted], abs=1e-5)
    assert [q for _, q in got] == pytest.approx([q for _, q in wanted], abs=1e-5)


def test_null_in_null_out(db, passes):
    got = db.execute(
        """
        SELECT v_value(run, goal, page), q_value(run, goal, page, action), v_value(run, goal, page, NULL, NULL)
        FROM (VALUES (NULL, 'g', 'p', 'a'), ('latest', NULL, 'p', 'a'), ('latest', 'g', NULL, 'a'),
                     ('latest', 'g', 'p', NULL), ('latest', 'g', 'p', 'a')) AS t(run, goal, page, action)
        """
    ).fetchall()
    assert got[:3] == [(None, None, None)] * 3
    assert [x is None for x in got[3]] == [False, True, False]
    assert [x is None for x in got[4]] == [False] * 3
    assert db.execute("SELECT v_value('latest', goal, '') FROM episodes WHERE false").fetchall() == []
    assert passes == [1, 1]  # one state, once for V and once with its action


def test_whole_vectors_and_each_row_once(db, passes):
    sql = "SELECT sum(v_value('latest', 'g' || (i % 7), 'page')) FROM range(3000) AS r(i)"
    ((first,),) = db.execute(sql).fetchall()
    assert passes == [7]  # the second vector asks nothing new
    ((rows, _),) = db.execute(
        "SELECT count(*), sum(v_value('latest', 'h' || (i % 7), 'page')) FROM range(3000) AS r(i)"
        " WHERE v_value('latest', 'h' || (i % 7), 'page') IS NOT NULL"
    ).fetchall()
    assert passes == [7, 7]
    assert rows == 3000
    assert first == pytest.approx(sum(v * n for v, n in self_made(db)), abs=1e-4)


def self_made(db):
    rows = db.execute("SELECT i, v_value('latest', 'g' || i, 'page') FROM range(7) AS r(i)").fetchall()
    return [(v, len(range(i, 3000, 7))) for i, v in rows]


def test_what_is_remembered_is_bounded(db, passes, monkeypatch):
    monkeypatch.setattr(udf, "KEPT", 10)
    sql = "SELECT i, v_value('latest', 'g' || i, 'page') FROM range(40) AS r(i)"
    first = db.execute(sql).fetchall()
    assert [v for _, v in db.execute(sql).fetchall()] == pytest.approx([v for _, v in first], abs=1e-5)
    assert passes == [40, 30]
    db.execute("SELECT v_value('latest', 'g' || i, 'page') FROM range(30, 40) AS r(i)").fetchall()
    assert passes == [40, 30]


def test_several_actions_at_a_state_encode_it_once(db, monkeypatch):
    tokens = []
    encode = backbone.hidden_states

    def counted(model, ids, layout):
        tokens.append(len(ids))
        return encode(model, ids, layout)

    monkeypatch.setattr(backbone, "hidden_states", counted)
    page = " ".join(f"[{i}] button" for i in range(60))
    sql = "SELECT q_value('latest', 'buy', $page, 'click ' || i) FROM range({}) AS r(i)"
    db.execute(sql.format(1), {"page": page}).fetchall()
    db.execute(sql.format(9), {"page": page}).fetchall()
    assert tokens[1] < 1.5 * tokens[0]


def test_runs_are_named_by_id_latest_and_folder(db, folder, runs):
    sql = "SELECT v_value($run, 'g', 'p'), q_value($run, 'g', 'p', 'a')"
    (latest,), (named,), (by_folder,), (v_alone,) = (
        db.execute(sql, {"run": run}).fetchall()
        for run in ("latest", runs["q_mc"], str(folder / "runs" / runs["q_mc"]), runs["critic_mc"])
    )
    assert latest == named == by_folder
    assert None not in latest
    assert v_alone[0] is not None
    assert v_alone[1] is None  # critic_mc has no Q
    both = db.execute(
        "SELECT v_value(run, 'g', 'p') FROM (VALUES ($a), ($b)) AS t(run)", {"a": runs["q_mc"], "b": runs["critic_mc"]}
    )
    assert both.fetchall() == [(named[0],), (v_alone[0],)]


@pytest.mark.parametrize(("run", "message"), [("nobody", "no run `nobody` in"), ("./nowhere", "holds no critic.json")])
def test_an_unknown_run_is_named(db, folder, capsys, run, message):
    with pytest.raises(duckdb.Error, match=message):
        db.execute("SELECT v_value($run, 'g', 'p')", {"run": run})
    assert query.main(["SELECT v_value($r, 'g', 'p')", f"r={run}", f"store={folder}"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert message in told
    assert "UDF" not in told
    assert told.count("\n") == 1


def test_a_critic_of_whole_turns_is_not_given_less(db, folder, runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folder / "runs" / runs["q_mc"], run)
    config = json.loads((run / "critic.json").read_text())
    (run / "critic.json").write_text(json.dumps({**config, "context": "turns"}))
    assert db.execute("SELECT v_value($run, 'g', 'p')", {"run": str(run)}).fetchall()[0][0] is not None
    with pytest.raises(duckdb.Error, match=r"reads whole past turns .*offline_lm\.score"):
        db.execute("SELECT v_value($run, 'g', 'p', history := ['back'])", {"run": str(run)})


def test_from_the_query_command(folder, capsys):
    capsys.readouterr()
    sql = "SELECT step, q_value('latest', goal, observation, action) AS q FROM run_values WHERE q IS NOT NULL LIMIT 3"
    assert query.main([sql, f"store={folder}", "format=csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 3
    assert all(float(row["q"]) for row in rows)


def test_opening_a_connection_imports_no_torch(folder):
    code = (
        f"import sys, offline_lm; db = offline_lm.connect({str(folder)!r});"
        "db.execute('SELECT count(*) FROM steps').fetchall(); print('torch' in sys.modules);"
        "print(db.execute(\"SELECT v_value('latest', 'g', 'p') IS NULL\").fetchone()[0], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\nFalse True\n"
    assert "leak" not in done.stderr  # the connection was open when Python ended


def test_several_threads_may_ask(folder):
    with offline_lm.connect(folder) as db:
        sql = "SELECT sum(v_value('latest', 'g' || (i % 50), 'page')) FROM range(500) AS r(i)"
        ((alone,),) = db.execute(sql).fetchall()
        sums = []
        threads = [threading.Thread(target=lambda: sums.extend(db.cursor().execute(sql).fetchall())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [x for (x,) in sums] == pytest.approx([alone] * 4)


def test_a_run_is_loaded_once(db, monkeypatch):
    loads = []
    load = Critic.from_pretrained
    monkeypatch.setattr(Critic, "from_pretrained", lambda run: loads.append(run) or load(run))
    udf._load.cache_clear()
    for i in range(3):
        db.execute("SELECT v_value('latest', 'once ' || $i, 'p')", {"i": i}).fetchall()
    assert len(loads) == 1

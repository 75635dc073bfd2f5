"""The doctor: damaged stores, each repaired with a report of exactly what is gone."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from offline_lm import doctor
from offline_lm.errors import UserError
from offline_lm.store import Store, schema
from offline_lm.store.check import examine, repair
from offline_lm.store.ingest import add
from offline_lm.store.rows import episode_id
from offline_lm.types import Episode, Step

EPISODES = 12


def id_of(n):
    return episode_id("test", None, str(n))


def episode(n):
    steps = tuple(Step(step=t, observation=f"page {n} {t} " * 20, action=f"click[{t}]") for t in range(3))
    return Episode(source="test", native_id=str(n), goal=str(n), uri=f"log-{n}.jsonl", steps=steps)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Four commits of three episodes; never damaged itself."""
    store = Store.create(tmp_path_factory.mktemp("whole") / "store")
    for first in range(0, EPISODES, 3):
        add(store, [episode(n) for n in range(first, first + 3)])
    assert examine(store.url, deep=True) == []
    return Path(store.url)


def cut(path, rng):
    os.truncate(path, rng.randrange(1, path.stat().st_size))


def empty(path, rng):
    os.truncate(path, 0)


def remove(path, rng):
    path.unlink()


def garble(path, rng):
    """A burst of wrong bytes, as of a bad sector; in a Parquet file within its pages."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(4, max(5, len(data) // 2))
    data[at : at + 64] = bytes(rng.randrange(256) ^ 0x5A for _ in data[at : at + 64])
    path.write_bytes(data)


def damage(store, rng):
    """Damages one file; what it was, for the message."""
    table = rng.choice(["steps", "episodes"])
    folder = store / "tables" / table
    kind = rng.choice(["log", "log", "data"])
    how = rng.choice([cut, empty, remove, garble])
    if kind == "log":
        newest_first = sorted((folder / "_delta_log").glob("*.json"), reverse=True)
        path = newest_first[0] if rng.random() < 0.7 else rng.choice(newest_first)
        if how is remove and path == newest_first[0]:
            how = cut  # the newest commit gone without a trace is a store without it: nobody can tell
    else:
        path = rng.choice(sorted(folder.glob("*.parquet")))
    how(path, rng)
    return f"{how.__name__} {path.relative_to(store)}"


def held(store):
    """Every episode that can be seen, with its pages."""
    with Store.open(store).connect() as db:
        rows = db.execute("""
            SELECT e.goal, list(s.observation ORDER BY s.step) FROM episodes AS e LEFT JOIN steps AS s
            USING (episode_id) GROUP BY ALL
        """).fetchall()
    assert len(rows) == len(dict(rows))
    return dict(rows)


@pytest.mark.parametrize("seed", range(int(os.environ.get("DAMAGED_STORES", "16"))))
def test_damaged_stores_are_repaired_with_a_report(whole, tmp_path, capsys, seed):
    """``DAMAGED_STORES=100`` for a hundred."""
    before, rng, store = held(whole), random.Random(seed), tmp_path / "store"
    shutil.copytree(whole, store)
    what = damage(store, rng)
    assert doctor.main([f"store={store}", "deep=true"]) == 1, what
    capsys.readouterr()
    assert doctor.main([f"store={store}", "repair=true", "deep=true", "json=true"]) == 0, what
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    after = held(store)
    assert after.items() <= before.items(), what  # whole episodes, none changed
    gone = before.keys() - after.keys()
    assert len(gone) <= 3 or f"{0:020}.json" in what, what  # those of one commit
    # By log, or by id where the rows that knew the log are what is lost.
    named = [n for n in range(EPISODES) if {f"log-{n}.jsonl ({n})", f"episode {id_of(n)}"} & set(report["lost"])]
    assert gone <= set(map(str, named)), what
    add(Store.open(store), [episode(n) for n in named])
    assert held(store) == before, what
    assert all(finding.harmless for finding in examine(store, deep=True)), what


def test_the_report_names_what_is_gone(whole, tmp_path, capsys):
    store = tmp_path / "store"
    shutil.copytree(whole, store)
    newest = max((store / "tables" / "episodes" / "_delta_log").glob("*.json"))
    os.truncate(newest, 0)
    assert doctor.main([f"store={store}", "json=true"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["found"] == {"log_empty": 1}
    assert doctor.main([f"store={store}", "repair=true", "json=true"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["repaired"] == {"log_empty": 1}
    assert result["lost"] == [f"log-{n}.jsonl ({n})" for n in (10, 11, 9)]
    moved = [path.name for path in (store / "lost").rglob("*.json")]
    assert moved == [newest.name]  # nothing is deleted


def test_lost_steps_take_their_episodes_along(whole, tmp_path, capsys):
    store = tmp_path / "store"
    shutil.copytree(whole, store)
    file = Path(Store.open(store).files("steps")[0])
    names = sorted(
        {row["episode_id"] for row in Store.open(store).read_file("steps", str(file), ["episode_id"]).to_pylist()}
    )
    file.unlink()
    assert doctor.main([f"store={store}", "repair=true", "json=true"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["repaired"] == {"file_missing": 1, "episode_incomplete": len(names)}
    assert len(result["lost"]) == len(names) == 3
    assert len(held(store)) == EPISODES - 3


def test_a_checkpoint_is_only_a_shortcut(tmp_path):
    store = Store.create(tmp_path / "store")
    for n in range(3):
        add(store, [episode(n)])
    store.delta("episodes").create_checkpoint()
    log = Path(store.table_url("episodes"), "_delta_log")
    (checkpoint,) = log.glob("*.checkpoint.parquet")
    os.truncate(checkpoint, checkpoint.stat().st_size // 2)
    assert {finding.kind for finding in repair(store.url)} == {"checkpoint_torn"}
    assert len(held(store.url)) == 3
    assert examine(store.url) == []


def test_missing_media_are_found(tmp_path):
    store = Store.create(tmp_path / "store")
    shot = {"sha256": "ab" * 32, "mime": "image/png", "status": "ok", "data": b"\x89PNG\r\n\x1a\n"}
    add(
        store,
        [
            Episode(
                source="test",
                native_id="1",
                steps=(Step(step=0, observation="o", action="a", screenshot=shot),),
            )
        ],
    )
    (picture,) = Path(store.url, "media", "ab").iterdir()
    assert picture.read_bytes() == shot["data"]
    assert examine(store.url) == []
    picture.unlink()
    assert [finding.kind for finding in examine(store.url)] == ["media_missing"]


def test_no_store(tmp_path):
    with pytest.raises(UserError, match=r"no store at .*nowhere: it has no folder `tables`"):
        examine(tmp_path / "nowhere")
    with pytest.raises(UserError, match="doctor looks at folders"):
        examine("s3://bucket/store")


def test_every_table_is_looked_at(whole):
    assert {path.name for path in (whole / "tables").iterdir()} <= set(schema.TABLES)

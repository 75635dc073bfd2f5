"""Compaction, vacuum and time travel."""

import json
import os
import time

import pytest

from offline_lm.errors import UserError
from offline_lm.store import Store
from offline_lm.store.check import examine
from offline_lm.store.ingest import add
from offline_lm.store.maintain import compact, vacuum
from offline_lm.types import Episode, Step


def episode(n):
    steps = tuple(Step(step=t, observation=f"page {n} {t}", action=f"click[{t}]", reward=float(t)) for t in range(3))
    return Episode(source="test", native_id=str(n), goal=str(n), steps=steps)


@pytest.fixture
def store(tmp_path):
    store = Store.create(tmp_path / "store")
    for n in range(6):
        add(store, [episode(n)])
    return store


def content(store):
    with store.connect() as db:
        return db.execute("FROM steps JOIN episodes USING (episode_id) ORDER BY episode_id, step").fetchall()


def test_compaction_keeps_every_row_and_leaves_one_file(store):
    before = content(store)
    assert compact(store) == {
        "episodes": {"before": 6, "after": 1, "dropped": 0},
        "steps": {"before": 6, "after": 1, "dropped": 0},
    }
    assert content(store) == before
    assert compact(store) == {}
    assert not examine(store.url, deep=True)


def test_compaction_aims_at_a_size(store):
    files = store.files("steps")
    one = max(os.path.getsize(file) for file in files)
    compact(store, target=4 * one)
    assert 1 < len(store.files("steps")) < 6


def test_steps_that_no_episode_claims_go_once_they_are_old(store):
    before = content(store)
    orphan = {"episode_id": "nobody", "ingest_id": "dead", "step": 0, "is_final_observation": False}
    store.append("steps", [orphan])
    assert compact(store)["steps"]["dropped"] == 0  # its writer may be at work
    assert content(store) == before
    store.append("steps", [orphan])
    real = time.time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + 2 * 24 * 3600)
        assert compact(store)["steps"]["dropped"] == 2
    assert content(store) == before


def test_duplicates_are_still_known_after_compaction(store):
    compact(store)
    counts = add(store, [episode(3), episode(7)])
    assert (counts["accepted"], counts["duplicates"]) == (1, 1)


def test_a_store_as_it_was(store):
    with Store.open(store.url, 2).connect() as db:
        assert db.execute("SELECT count(*), max(goal) FROM episodes").fetchone() == (2, "1")
        assert db.execute("SELECT count(*) FROM steps").fetchone() == (6,)
    with pytest.raises(UserError, match="version 99 of episodes does not exist; the newest is 6"):
        Store.open(store.url, 99)


def test_vacuum_keeps_what_a_run_was_trained_on(store):
    trained = Store.open(store.url, 4).frozen()
    wanted = content(trained)
    row = {"run_id": "iql-1", "status": "finished", "store_versions": json.dumps(trained.versions())}
    store.append("runs", [row])
    compact(store)
    now = content(store)
    assert vacuum(store, hours=0) == {"episodes": 2}  # of the six files the run read four; it read all of `steps`
    assert content(store) == now
    assert content(Store.open(store.url, "iql-1")) == wanted
    assert len(wanted) == 12
    with pytest.raises(UserError, match=r"version 6 of episodes .* is gone: it was vacuumed away"):
        Store.open(store.url, 6)


def test_vacuum_takes_old_files_of_killed_writers_and_no_young_ones(store):
    stray = os.path.join(store.table_url("steps"), "part-stray.parquet")
    with open(stray, "wb") as file:
        file.write(b"PAR1")
    vacuum(store, hours=24)
    assert os.path.exists(stray)
    old = time.time() - 48 * 3600
    os.utime(stray, (old, old))
    vacuum(store, hours=24)
    assert not os.path.exists(stray)
    assert not examine(store.url)

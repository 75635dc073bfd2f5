import json

import pytest

from offline_lm import cli, ingest
from offline_lm.store import Store

LINE = {
    "task_id": "shop/17",
    "goal": "Buy a red mug",
    "success": True,
    "terminated": True,
    "steps": [{"observation": "home", "action": "click[4]", "reward": 1}],
}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bad = "{not json"
    lines = [json.dumps(LINE), json.dumps(LINE | {"task_id": "shop/18"}), bad]
    (tmp_path / "log, 1.jsonl").write_text("\n".join(lines) + "\n")

    def run(*argv):
        code = cli.run("ingest", ingest.ingest, list(argv))
        return (code, *capsys.readouterr())

    return run


def test_counts_in_words_and_json(run):
    code, out, _ = run("path=log, 1.jsonl", "store=here", "json=true")
    assert code == 0
    words, last = out.splitlines()
    counts = json.loads(last)
    reasons = counts.pop("by_reason")
    assert counts == {"read": 3, "accepted": 2, "duplicates": 0, "quarantined": 1, "episodes": 2, "steps": 2}
    assert list(reasons.values()) == [1]
    assert words.startswith("read 3: accepted 2, duplicates 0, quarantined 1 (")
    assert words.endswith("2 steps of 2 episodes added to " + Store.open("here").url)
    assert "accepted 0, duplicates 2, quarantined 1" in run("path=log, 1.jsonl", "store=here")[1]


def test_strict_names_the_file_and_the_place(run, tmp_path):
    code, _, err = run("path=log, 1.jsonl", "mode=strict")
    assert code == 2
    offset = sum(len(line) + 1 for line in (tmp_path / "log, 1.jsonl").read_text().splitlines()[:2])
    assert "log, 1.jsonl" in err
    assert str(offset) in err
    assert Store.open("store").connect().sql("SELECT count(*) FROM episodes").fetchall() == [(0,)]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["path=nowhere"], "nowhere does not exist"),
        (["path=.", "source=nope"], "jsonl, miniwob_demos"),
        (["path=.", "mode=lenient"], "there are quarantine and strict"),
        ([], "path= must be given"),
    ],
)
def test_mistakes_leave_no_store_behind(run, tmp_path, argv, message):
    code, _, err = run(*argv)
    assert code == 2
    assert message in err
    assert not (tmp_path / "store").exists()

import base64
import hashlib
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


def test_counts_in_words_and_json(run, tmp_path):
    code, out, _ = run("path=log, 1.jsonl", "store=here", "json=true")
    assert code == 0
    words, last = out.splitlines()
    counts = json.loads(last)
    reasons = counts.pop("by_reason")
    assert counts.pop("seconds") > 0
    assert counts.pop("bytes") == (tmp_path / "log, 1.jsonl").stat().st_size
    assert counts.pop("redacted") == {}
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
        (["path=.", "source=nope"], "take one of: auto, adp"),
        (["path=.", "mode=lenient"], "there are quarantine and strict"),
        (["path=.", "media=burn"], "there are keep and reference"),
        (["path=.", "engine=steam"], "there are processes, ray and daft"),
        (["path=.", "+options.colour=red"], "source=auto does not know colour; its options are"),
        (["path=.", "labels=nowhere.csv"], "nowhere.csv"),
        (["path=.", "redact=all"], "redact"),
        ([], "path= must be given"),
    ],
)
def test_mistakes_leave_no_store_behind(run, tmp_path, argv, message):
    code, _, err = run(*argv)
    assert code == 2
    assert message in err
    assert not (tmp_path / "store").exists()


def test_workers_and_bundles_change_nothing(run, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for n in range(30):
        (folder / f"{n:02}.jsonl").write_text(json.dumps(LINE | {"task_id": f"shop/{n % 20}", "policy_id": "p"}) + "\n")
    stores = {}
    for workers in (1, 2):
        code, out, _ = run("path=many", f"store=s{workers}", f"workers={workers}", "json=true")
        assert code == 0
        counts = json.loads(out.splitlines()[-1])
        assert (counts["accepted"], counts["duplicates"]) == (20, 10)
        with Store.open(f"s{workers}").connect() as db:
            stores[workers] = db.execute("SELECT * EXCLUDE (ingest_id) FROM episodes ORDER BY episode_id").fetchall()
    assert stores[1] == stores[2]


def test_a_large_file_is_read_in_ranges(run, tmp_path, monkeypatch):
    monkeypatch.setattr("offline_lm.logs.RANGE_BYTES", 500)
    lines = [json.dumps(LINE | {"task_id": f"shop/{n}", "goal": "x" * (n * 37 % 300)}) for n in range(50)]
    (tmp_path / "big.jsonl").write_text("\n".join(lines))
    code, out, _ = run("path=big.jsonl", "store=s", "json=true")
    assert code == 0
    counts = json.loads(out.splitlines()[-1])
    assert (counts["read"], counts["accepted"], counts["steps"]) == (50, 50, 50)


def test_labels_are_joined_and_counted(run, tmp_path):
    unlabelled = {key: value for key, value in LINE.items() if key != "success"}
    unlabelled["steps"] = [{"observation": "home", "action": "click[4]"}, {"observation": "cart", "action": "buy"}]
    rows = [json.dumps(unlabelled | {"task_id": f"shop/{n}"}) for n in range(3)]
    (tmp_path / "chats.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "outcomes.csv").write_text("task_id,reward\nshop/0,1\nshop/2,0.25\nshop/9,1\n")
    code, out, _ = run("path=chats.jsonl", "store=s", "labels=outcomes.csv", "json=true")
    assert code == 0
    assert "labels: 2 of 3 rows of outcomes.csv named an episode" in out
    assert json.loads(out.splitlines()[-1])["labels"] == {"rows": 3, "used": 2}
    with Store.open("s").connect() as db:
        rows = db.execute(
            "SELECT task_id, reward, reward_source FROM steps JOIN episodes USING (episode_id) ORDER BY ALL"
        )
        assert rows.fetchall() == [
            ("shop/0", 0.0, "outcome"),
            ("shop/0", 1.0, "outcome"),
            ("shop/1", None, None),
            ("shop/1", None, None),
            ("shop/2", 0.0, "outcome"),
            ("shop/2", 0.25, "outcome"),
        ]


def test_secrets_are_redacted_unless_told_otherwise(run, tmp_path):
    key = "sk-" + "proj-" + "a1B2" * 12
    page = {"observation": f"your api key: {key}", "action": "click[4]", "reward": 1}
    (tmp_path / "keys.jsonl").write_text(json.dumps(LINE | {"steps": [page]}) + "\n")
    assert run("path=keys.jsonl", "store=clean")[0] == 0
    assert run("path=keys.jsonl", "store=raw", "redact=none")[0] == 0
    pages = {}
    for name in ("clean", "raw"):
        with Store.open(name).connect() as db:
            ((pages[name],),) = db.execute("SELECT observation FROM steps").fetchall()
    assert pages["raw"] == page["observation"]
    assert key not in pages["clean"]
    assert pages["clean"].startswith("your api key: [redacted:")


def test_pictures_are_kept_or_named(run, tmp_path):
    png = b"\x89PNG\r\n\x1a\n" + bytes(20)
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(png).decode()}}
    chat = [
        {"role": "user", "content": [image, {"type": "text", "text": "look"}]},
        {"role": "assistant", "content": "A"},
    ]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    for media, status in (("keep", "stored"), ("reference", "referenced")):
        assert run("path=chat.jsonl", "source=chat", f"store={media}", f"media={media}")[0] == 0
        with Store.open(media).connect() as db:
            ((shot,),) = db.execute("SELECT screenshot FROM steps").fetchall()
        assert shot == {"sha256": hashlib.sha256(png).hexdigest(), "mime": "image/png", "status": status}
    (kept,) = [path for path in (tmp_path / "keep" / "media").rglob("*") if path.is_file()]
    assert kept.read_bytes() == png
    assert not (tmp_path / "reference" / "media").exists()

"""Every question of analysis/ on a small store whose answers are worked out by hand."""

import json

import pytest

from offline_lm import paths, query
from offline_lm.store import Store
from offline_lm.store.ingest import add
from offline_lm.types import Candidate, Episode, Rejected, Step

QUESTIONS = sorted(file.name for file in paths.ANALYSIS.glob("*.sql"))


def episode(name, success, actions, *, final=False, **kwargs):
    n = len(actions)
    steps = [
        Step(
            step=t,
            observation=f"page of {name}" if t < 2 else f"page {t} of {name}",  # the first page comes twice
            action=action,
            action_name=action.split("[")[0],
            reward=float(success) if t == n - 1 else 0.0,
            terminated=t == n - 1 and not final,
            truncated=t == n - 1 and final,
            candidates=None if final else (Candidate(action=action, executed=True), Candidate(action="wait")),
            candidates_complete=True if t == 0 and not final else None,
            action_valid=t != 1,
        )
        for t, action in enumerate(actions)
    ]
    if final:
        steps.append(Step(step=n, observation="the end", is_final_observation=True))
    return Episode(source="jsonl", native_id=name, task_id=name, steps=tuple(steps), success=success, **kwargs)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = Store.create(tmp_path_factory.mktemp("analysis") / "store")
    add(
        store,
        [
            episode("buy", True, ["click[1]", "click[2]", "fill[3]", "click[4]"], site="shop", task_family="buy"),
            episode("find", False, ["click[1]", "back"], site="wiki", task_family="find"),
            episode("read", False, ["click[1]", "scroll"], final=True, site="wiki", task_family="find"),
            Rejected(source="jsonl", uri="x", offset=0, reason="json_syntax", message="bad"),
            Rejected(source="other", uri="x", offset=0, reason="json_syntax", message="bad"),
        ],
    )
    ids = dict(store.connect().sql("SELECT task_id, episode_id FROM episodes").fetchall())
    v = {"buy": [0.5, 0.6, 0.9, 0.8], "find": [0.4, 0.35], "read": [0.3, 0.2, 0.05]}
    q = {"buy": [0.6, 0.9, 0.8, 1.0], "find": [0.1, 0.3], "read": [0.2, 0.15]}
    for run in ("old", "new"):
        shift = 0.0 if run == "new" else 7.0
        rows, others = [], []
        for name, values in v.items():
            for t, x in enumerate(values):
                row = {"run_id": run, "episode_id": ids[name], "step": t, "v": x + shift}
                row["split"] = "train" if name == "buy" else "test"
                if t < len(q[name]):
                    row |= {
                        "q": q[name][t],
                        "advantage": q[name][t] - x + shift,
                        "return": float(name == "buy"),
                    }
                    for i, (action, value) in enumerate([("taken", q[name][t]), ("wait", 0.5)]):
                        key = {"run_id": run, "episode_id": ids[name], "step": t, "candidate": i}
                        others.append(key | {"action": action, "q": value, "executed": i == 0})
                rows.append(row)
        store.append("values", rows)
        store.append("candidate_values", others)
        store.append("runs", [{"run_id": run, "status": "finished"}])
        row = {"run_id": run, "split": "test", "group": "q_mc", "name": "dead_head"}
        said = json.dumps({"sentence": f"{run}: a dead head", "threshold": 0.05})
        store.append("diagnostics", [{**row, "suite": "alarms", "value": 0.01, "extra": said}])
        store.append("diagnostics", [{**row, "suite": "fit", "name": "spread", "value": 0.01}])
    about = {"run_id": "credit-1", "suite": "credit", "group": "td exact", "n": 5}
    for seed, sign in enumerate((0.5, 1.0)):
        figures = {"scale": 0.5, "bias_squared": 0.09, "action_bias_squared": -0.01, "variance": 0.16}
        figures |= {"sign_accuracy": sign, "correlation": 0.8}
        key = json.dumps({"horizon": 5, "method": "td", "critic": "exact", "lam": 0, "seed": seed})
        store.append("diagnostics", [about | {"name": k, "value": v, "extra": key} for k, v in figures.items()])
    about = {"run_id": "loop-s0", "suite": "loop", "group": "online", "split": "unseen"}
    about["extra"] = json.dumps({"round": 1, "run": "new", "critic": "new"})
    store.append("diagnostics", [about | {"name": "success", "value": 0.5, "low": 0.4, "high": 0.6, "n": 100}])
    return store


def ask(store, name, **params):
    sql = query.read_sql(name)
    with store.connect() as db:
        wanted = db.extract_statements(sql)[0].named_parameters
        result = db.execute(sql, query.bind(sql, wanted, {k: str(v) for k, v in params.items()}, store) or None)
        columns = [column[0] for column in result.description]
        return [dict(zip(columns, row, strict=True)) for row in result.fetchall()]


def pick(rows, *columns):
    return [tuple(row[column] for column in columns) for row in rows]


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_header_names_the_columns_and_the_parameters(store, name):
    sql = query.read_sql(name)
    head = "\n".join(line for line in sql.splitlines() if line.startswith("--"))
    rows = ask(store, name)
    assert rows
    for column in rows[0]:
        assert column in head
    with store.connect() as db:
        assert db.extract_statements(sql)[0].named_parameters == set(query.declared(sql))


def test_all_questions_are_there():
    assert QUESTIONS == [
        "advantages.sql",
        "alarms.sql",
        "best_candidates.sql",
        "by_task.sql",
        "calibration.sql",
        "credit.sql",
        "decisive_steps.sql",
        "log_quality.sql",
        "loop.sql",
        "mid_episode_auc.sql",
        "where_value_was_lost.sql",
    ]


def test_alarms(store):
    dead = {"critic": "q_mc", "split": "test", "alarm": "dead_head", "value": 0.01, "threshold": 0.05}
    assert ask(store, "alarms.sql") == [{**dead, "sentence": "new: a dead head"}]
    assert ask(store, "alarms.sql", run="old") == [{**dead, "sentence": "old: a dead head"}]


def test_credit(store):
    (row,) = ask(store, "credit.sql")
    assert [row[key] for key in ("horizon", "method", "critic", "lam", "steps", "seeds")] == [
        5,
        "td",
        "exact",
        0,
        10,
        2,
    ]
    figures = ("bias", "action_bias", "sd", "rmse", "sign_accuracy", "sign_accuracy_sd", "correlation")
    assert [row[key] for key in figures] == pytest.approx([0.6, 0, 0.8, 1, 0.75, 0.125**0.5, 0.8])
    assert ask(store, "credit.sql", measurement="none") == []


def test_advantages_of_one_episode(store):
    failed = "SELECT episode_id FROM episodes WHERE success = false ORDER BY task_id"
    (find,), (read,) = store.connect().sql(failed).fetchall()
    v, q = [0.4, 0.35], [0.1, 0.3]
    rows = ask(store, "advantages.sql", episode=find, gamma=0.5, lam=0.8)
    assert pick(rows, "task_id", "success", "step", "action", "reward", "v", "q") == [
        ("find", False, 0, "click[1]", 0.0, 0.4, 0.1),
        ("find", False, 1, "back", 0.0, 0.35, 0.3),
    ]
    delta = [0.5 * v[1] - v[0], 0 - v[1]]
    want = {
        "reinforce_trajectory": [0, 0],
        "reinforce": [0, 0],
        "mc": [-0.4, -0.35],
        "td": delta,
        "gae": [delta[0] + 0.5 * 0.8 * delta[1], delta[1]],
        "archer": [q[0] - v[0], q[1] - v[1]],
        "grpo": [0, 0],  # alone in its task
    }
    for method, advantages in want.items():
        assert [row[method] for row in rows] == pytest.approx(advantages), method
    assert ask(store, "advantages.sql")[0]["episode_id"] == min(find, read)
    assert ask(store, "advantages.sql", episode="nowhere") == []


def test_decisive_steps_by_advantage(store):
    rows = ask(store, "decisive_steps.sql")
    assert pick(rows, "verdict", "task_id", "step", "action") == [
        ("won", "buy", 1, "click[2]"),
        ("lost", "find", 0, "click[1]"),
        ("lost", "read", 0, "click[1]"),
    ]
    assert [row["score"] for row in rows] == pytest.approx([0.3, -0.3, -0.1])


def test_decisive_steps_by_the_change_of_value(store):
    rows = ask(store, "decisive_steps.sql", by="v")
    assert pick(rows, "task_id", "step") == [("find", 1), ("buy", 1), ("read", 1)]
    assert [row["score"] for row in rows] == pytest.approx([-0.35, 0.3, -0.15])
    assert rows[2]["v_next"] == pytest.approx(0.05)
    assert len(ask(store, "decisive_steps.sql", by="v", k=1)) == 1


def test_another_run_can_be_named(store):
    rows = ask(store, "decisive_steps.sql", run="old", by="v")
    assert {round(row["v"]) for row in rows} == {7, 8}


def test_where_value_was_lost(store):
    rows = {(row["dimension"], row["value"]): row for row in ask(store, "where_value_was_lost.sql")}
    wiki = rows["site", "wiki"]
    assert (wiki["steps"], wiki["episodes"], wiki["success_rate"]) == (4, 2, 0.0)
    assert wiki["lost"] == pytest.approx(-0.3 - 0.05 - 0.1 - 0.05)
    assert wiki["lost_per_step"] == pytest.approx(-0.125)
    assert rows["site", "shop"]["lost"] == pytest.approx(-0.1)
    click = rows["action_name", "click"]
    assert (click["steps"], click["episodes"], click["lost"]) == (5, 3, pytest.approx(-0.4))
    assert click["success_rate"] == pytest.approx(1 / 3)
    assert [rows["position", f"{i}/4"]["steps"] for i in (1, 2, 3, 4)] == [3, 1, 3, 1]
    assert rows["task_family", "find"]["mean_advantage"] == pytest.approx(-0.125)
    assert {row["dimension"] for row in ask(store, "where_value_was_lost.sql", min_steps=5)} == {"action_name"}


def test_best_candidates(store):
    rows = ask(store, "best_candidates.sql")
    assert pick(rows, "task_id", "step", "better_action", "candidates") == [
        ("find", 0, "wait", 2),
        ("read", 1, "wait", 2),
        ("read", 0, "wait", 2),
        ("find", 1, "wait", 2),
    ]
    assert [row["gap"] for row in rows] == pytest.approx([0.4, 0.35, 0.3, 0.2])


def test_calibration(store):
    rows = ask(store, "calibration.sql", bins=2)
    assert pick(rows, "split", "low", "high", "steps", "episodes", "success_rate") == [
        ("test", 0.0, 0.5, 4, 2, 0.0),
        ("train", 0.5, 1.0, 4, 1, 1.0),
    ]
    test, train = rows
    assert test["mean_v"] == pytest.approx((0.4 + 0.35 + 0.3 + 0.2) / 4)
    assert test["gap"] == pytest.approx(test["mean_v"])
    assert train["gap"] == pytest.approx(0.7 - 1)
    assert train["brier"] == pytest.approx((0.25 + 0.16 + 0.01 + 0.04) / 4)
    wide = ask(store, "calibration.sql", run="old", bins=1)
    assert wide[0]["low"] == 0
    assert wide[0]["high"] == pytest.approx(7.9)


def test_by_task(store):
    rows = ask(store, "by_task.sql")
    assert pick(rows, "task_id", "split", "episodes", "success_rate", "mean_steps", "v_first", "worst_action") == [
        ("find", "test", 1, 0.0, 2.0, 0.4, "click[1]"),
        ("read", "test", 1, 0.0, 2.0, 0.3, "click[1]"),
        ("buy", "train", 1, 1.0, 4.0, 0.5, "fill[3]"),
    ]
    assert [row["error"] for row in rows] == pytest.approx([0.4, 0.3, -0.5])
    assert rows[2]["worst_advantage"] == pytest.approx(-0.1)


def test_log_quality(store):
    jsonl, other = ask(store, "log_quality.sql")
    assert jsonl == {
        "source": "jsonl",
        "dataset": None,
        "episodes": 3,
        "steps": 8,
        "success_rate": pytest.approx(1 / 3),
        "unlabelled": 0,
        "cut_off": 1,
        "open_ended": 0,
        "final_observations": 1,
        "no_candidates": 2,
        "incomplete_candidates": 4,
        "no_reward": 0,
        "invalid_actions": 3,
        "repeated_pages": 3,
        "quarantined": 1,
    }
    assert (other["source"], other["episodes"], other["quarantined"]) == ("other", None, 1)

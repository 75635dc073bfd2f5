"""`evaluate suite=credit` from end to end, on few logs."""

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from offline_lm import evaluate, query
from offline_lm._evaluate_credit import behaviour
from offline_lm.envs.shop import Site, Task, single_turn
from offline_lm.store import Store

FEW = (
    "suite=credit", "seeds=[0,1]", "credit.horizons=[1,6]", "credit.tasks=2", "credit.episodes=8", "credit.group=4",
    "credit.resamples=4", "credit.lambdas=[0.5]",
)  # fmt: skip


def test_table_rows_and_picture(tmp_path, capfd):
    plot, url = tmp_path / "plot.svg", tmp_path / "store"
    assert evaluate.main([*FEW, f"store={url}", f"credit.plot={plot}", "json=true"]) == 0
    *table, last = capfd.readouterr().out.splitlines()
    found = json.loads(last)
    by = {(row["horizon"], row["method"], row["critic"], row["lam"]): row for row in found["rows"]}
    assert len(by) == len(found["rows"]) == 2 * (4 + 4 * 3 + 4)
    assert by[6, "td", "exact", 0.0]["rmse"] == pytest.approx(0, abs=1e-12)
    assert by[6, "td", "exact", 0.0]["sign_accuracy"] == 1
    assert by[6, "mc", "exact", None]["variance"] > by[6, "gae", "exact", 0.5]["variance"] > 0
    for row in found["rows"]:
        assert row["bias_squared"] + row["variance"] >= 0
    single, longer = found["logs"]
    assert (single["horizon"], single["steps"]) == (1, 1)
    assert longer["horizon"] == 6
    assert 1 < longer["steps"] <= 18
    assert 0 <= longer["flat_groups"] < 1
    labels = [line.split("|")[0].strip() for line in table]
    assert {"td position", "gae(0.5) td_table", "dr_grpo"} <= set(labels)
    assert all(line.count("|") == 2 for line in table[2:])

    sql = query.read_sql("credit.sql")
    with Store.open(url).connect() as db:
        result = db.execute(sql, {"measurement": "latest"})
        columns = [column[0] for column in result.description]
        rows = [dict(zip(columns, row, strict=True)) for row in result.fetchall()]
    assert len(rows) == len(by)
    for row in rows:
        want = by[row["horizon"], row["method"], row["critic"], row["lam"]]
        assert row["sign_accuracy"] == pytest.approx(want["sign_accuracy"])
        assert row["bias"] == pytest.approx(max(want["bias_squared"], 0) ** 0.5 / want["scale"])
        assert row["seeds"] == 2
        assert row["steps"] == 2 * want["n"]

    drawing = ET.fromstring(plot.read_text(encoding="utf-8"))
    lines = [line.get("points") for line in drawing.iter("{http://www.w3.org/2000/svg}polyline")]
    assert len(lines) == 3 * 2 * 5  # figures, horizons, critics and Dr. GRPO
    width, height = float(drawing.get("width", 0)), float(drawing.get("height", 0))
    points = [tuple(map(float, point.split(","))) for line in lines for point in (line or "").split()]
    assert all(0 < x < width and 0 < y < height for x, y in points)


def test_a_second_measurement_is_the_one_that_is_asked_for(tmp_path, capfd):
    few = [*FEW, f"store={tmp_path}/store", "credit.horizons=[1]", "seeds=[0]", "json=true"]
    names = []
    for resamples in (2, 3):
        assert evaluate.main([*few, f"credit.resamples={resamples}"]) == 0
        names.append(json.loads(capfd.readouterr().out.splitlines()[-1])["measurement"])
    sql = query.read_sql("credit.sql")
    with Store.open(tmp_path / "store").connect() as db:
        first, second = (db.execute(sql, {"measurement": name}).fetchall() for name in names)
        latest = db.execute(sql, {"measurement": "latest"}).fetchall()
    assert latest in (first, second)
    assert first != second
    assert (latest == second) == (max(names) == names[1])  # of one second, the id decides


def test_a_single_turn_holds_every_end():
    mdp = Task(Site.draw(0), 0).mdp
    single = single_turn(mdp)
    assert single.next.tolist() == [[-1] * int((mdp.next == -1).sum())]
    assert sorted(single.reward[0]) == sorted(mdp.reward[mdp.next == -1])
    assert sorted(single.mistaken[0]) == sorted(mdp.mistaken[mdp.next == -1])
    assert single.optimal(0.95)[0].tolist() == [1.0]
    policy = behaviour(single, [0, 0])
    assert single.play(policy) == pytest.approx(single.reward[0] @ policy[0])


def test_behaviours_differ_between_tasks():
    mdp = Task(Site.draw(0), 0).mdp
    found = [behaviour(mdp, [0, i]) for i in range(4)]
    for policy in found:
        np.testing.assert_allclose(policy.sum(axis=1), 1)
        assert (policy[~mdp.valid] == 0).all()
    returns = [mdp.play(policy) for policy in found]
    assert np.ptp(returns) > 0.1
    assert min(returns) >= 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("credit.episodes=6", "credit.episodes=6: a multiple of credit.group=4"),
        ("credit.resamples=1", "credit.resamples=1: a whole number from 2"),
        ("credit.tasks=many", "credit.tasks=many"),
        ("credit.horizons=[3]", "a list of 1 and whole numbers from 5"),
        ("credit.horizons=[]", "a list of 1 and whole numbers from 5"),
        ("credit.lambdas=[0]", "a list of numbers above 0, up to 1"),
        ("credit.gamma=1", "credit.gamma=1: a number between 0 and 1"),
        ("credit.tau=0", "credit.tau=0"),
    ],
)
def test_mistakes(setting, message, capfd, tmp_path):
    assert evaluate.main([*FEW, f"store={tmp_path}/store", setting]) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "store").exists()

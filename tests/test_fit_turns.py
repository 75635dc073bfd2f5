"""A critic that reads whole past turns: what `fit` writes back is what `score` says of the same texts; tokens grow."""

import json

import orjson
import pytest

import offline_lm
from offline_lm import fit, ingest
from offline_lm.envs.shop import Site, Task, record
from offline_lm.errors import UserError
from offline_lm.models.critic import Critic

SMALL = [
    *("model=tiny", "model.stage.tokens=2000", "model.vocab_size=400"),
    *("model.width=32", "model.layers=1", "model.attention_heads=2"),
    *("optim.batch_size=64", "optim.warmup=2", "optim.steps=10", "threads=1", "logger=none", "baselines=false"),
    *("data.context=turns", "data.max_tokens=400", "json=true"),
]


def logs(folder, name, first):
    episodes = record([Task(Site.draw(3), i) for i in range(first, first + 3)], 2)
    (folder / name).write_bytes(b"\n".join(orjson.dumps(e) for e in episodes))
    assert ingest.main([f"path={folder / name}", f"store={folder / 'store'}"]) == 0


def run(folder, capsys, *arguments):
    assert fit.main([f"data.store={folder / 'store'}", *SMALL, *arguments]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])["run_id"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("turns")
    logs(folder, "first.jsonl", 0)
    return folder


def test_past_turns_score_as_fit_scored_them_and_a_grown_store_costs_new_episodes_alone(folder, capsys):
    run_id = run(folder, capsys)
    db = offline_lm.connect(folder / "store")
    rows = db.execute(
        "SELECT episode_id, step, goal, url, observation, action, v FROM latest_values ORDER BY episode_id, step"
    ).fetchall()
    db.close()
    states, values = [], []
    for n, (episode, _, goal, url, page, _, v) in enumerate(rows):
        past = [{"url": r[3], "observation": r[4], "action": r[5]} for r in rows[:n] if r[0] == episode]
        states.append({"goal": goal, "url": url, "observation": page, "history": past})
        values.append(v)
    critic = Critic.from_pretrained(folder / "store" / "runs" / run_id)
    assert [s.v for s in critic.score(states)] == pytest.approx(values, abs=1e-5)
    without = [{**state, "history": []} for state in states]
    assert [s.v for s in critic.score(without)] != pytest.approx(values, abs=1e-5)

    again = [f"model.path={folder / 'store' / 'runs' / run_id / 'backbone'}", "model.stage.tokens=0", "model=hf"]
    small = [a for a in SMALL if not a.startswith("model.")]
    caches = folder / "store" / "cache" / "tokens"
    before = set(caches.glob("*/*/meta.json"))
    assert fit.main([f"data.store={folder / 'store'}", *small, *again]) == 0
    assert set(caches.glob("*/*/meta.json")) == before  # the same tokenizer
    logs(folder, "more.jsonl", 3)
    assert fit.main([f"data.store={folder / 'store'}", *small, *again]) == 0
    (new,) = set(caches.glob("*/*/meta.json")) - before
    assert json.loads(new.read_text()) == {"episodes": 12, "copied": 6}


@pytest.mark.parametrize(
    ("past", "message"),
    [
        ([3], "`history` is a list of past actions, each a text or an object"),
        ([{"observation": "p"}], "a past turn in `history` needs `action` or `response`"),
        ([{"observation": 3, "action": "a"}], "`history` has `observation` 3, where a text is wanted"),
    ],
)
def test_a_history_that_is_none_is_the_users_mistake(shop, past, message):
    critic = Critic(shop.model, shop.tokenizer, _heads(), {"max_tokens": 200, "history": 2, "has_q": True})
    with pytest.raises(UserError, match=f"input record 0: {message}"):
        list(critic.score([{"goal": "g", "observation": "o", "history": past}]))


def _heads():
    from offline_lm.models.heads import Heads

    return Heads(16, hidden=8)

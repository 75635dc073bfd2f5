"""A critic saved and opened again; scores keep the order of records and candidates, errors name the record."""

import json

import pytest
import torch

from offline_lm.batches.tokens import tokenizer_id
from offline_lm.errors import UserError
from offline_lm.models import backbone
from offline_lm.models import critic as critic_module
from offline_lm.models.critic import Critic
from offline_lm.models.heads import Heads

PAGE = "Results for mug, page 1:\nred mug $9"
STATES = [
    {
        "goal": "Buy a red mug",
        "observation": PAGE,
        "candidates": ["click[red mug]", {"action": "back"}, "click[red mug]"],
    },
    {"goal": "Buy a lamp", "observation": PAGE, "action": "back", "history": ["search[lamp]"]},
    {"goal": "Buy a lamp", "observation": "Welcome"},
    {"goal": "Buy a red mug", "observation": PAGE, "action": "back", "candidates": ["click[red mug]", "back"]},
]


@pytest.fixture(scope="module")
def critic(shop):
    return made(shop)


def made(shop, has_q=True, **options):
    torch.manual_seed(0)
    heads = Heads(16, hidden=8, **options)
    for p in heads.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return Critic(
        shop.model, shop.tokenizer, heads, {"max_tokens": 200, "history": 2, "dtype": "float32", "has_q": has_q}
    )


def close(a, b):
    assert [x.v for x in a] == pytest.approx([x.v for x in b], abs=1e-5)
    for x, y in zip(a, b, strict=True):
        assert x.q == (None if y.q is None else pytest.approx(y.q, abs=1e-5))


@pytest.mark.parametrize("options", [{}, {"loss": "hl_gauss", "bins": 21, "high": 2.0}, {"has_q": False}])
def test_saved_and_opened_again_it_says_the_same(shop, tmp_path, options):
    critic = made(shop, **options)
    before = list(critic.score(STATES))
    critic.save(tmp_path / "run", backbone_path=None)
    again = Critic.from_pretrained(tmp_path / "run")
    close(list(again.score(STATES)), before)
    assert again.heads.options == critic.heads.options
    assert len({round(s.v, 5) for s in before}) > 1
    if options.get("has_q") is False:
        assert [s.q for s in before] == [None] * 4
    assert not list((tmp_path / "run").rglob("*.bin"))  # safetensors alone


def test_a_backbone_that_stays_outside_is_named_not_copied(shop, tmp_path):
    critic = made(shop)
    critic.save(tmp_path / "first", backbone_path=None)
    outside = str(tmp_path / "first" / "backbone")
    critic.save(tmp_path / "run", backbone_path=outside)
    assert not (tmp_path / "run" / "backbone").exists()
    assert json.loads((tmp_path / "run" / "critic.json").read_text())["backbone"] == outside
    close(list(Critic.from_pretrained(tmp_path / "run").score(STATES)), list(critic.score(STATES)))


def test_order_of_records_and_candidates_is_kept(critic):
    got = list(critic.score(STATES))
    assert [len(s.q) for s in got] == [3, 1, 0, 2]
    mug, back, mug_again = got[0].q
    assert mug == mug_again
    assert mug != pytest.approx(back, abs=1e-4)
    assert got[3].q == pytest.approx([mug, back], abs=1e-5)  # executed or not, an action has one value
    assert got[3].v == pytest.approx(got[0].v, abs=1e-5)


def test_chunks_and_budgets_change_nothing(critic):
    states = [STATES[i % 4] for i in range(11)]
    whole = list(critic.score(states))
    close(list(critic.score(iter(states), chunk=3, token_budget=1)), whole)
    close(whole[:4], list(critic.score(STATES)))


def test_q_is_the_least_of_the_ensemble(critic):
    state = STATES[1]
    (score,) = critic.score([state])
    seen = []
    critic.heads.q.register_forward_hook(lambda _module, _args, out: seen.append(out))
    list(critic.score([state]))
    critic.heads.q._forward_hooks.clear()
    assert seen[0].shape == (2, 1)
    assert score.q == pytest.approx([seen[0].min().item()])
    assert seen[0].min() < seen[0].max()


def test_history_and_goal_are_read(critic):
    plain = {key: value for key, value in STATES[1].items() if key != "history"}
    longer = {**plain, "history": ["a", "b", "search[lamp]"]}
    scores = list(critic.score([plain, STATES[1], longer, {**plain, "goal": "Buy a red mug"}]))
    assert len({round(s.v, 5) for s in scores}) == 4
    newest = {**plain, "history": ["x", "b", "search[lamp]"]}  # two are shown: the third from the end is not
    close(list(critic.score([newest])), [scores[2]])


def test_a_logged_step_and_the_same_as_a_record_score_alike(shop, critic):
    """What is trained on and what is asked later go through the same text."""
    from offline_lm.batches.pack import pack
    from offline_lm.batches.tokens import tokenize
    from offline_lm.models.backbone import hidden_states

    rows = shop.rows[: int(shop.replay.offsets[1])]
    tokens = tokenize(rows, shop.tokenizer, max_tokens=200, history=2)
    n = 2
    ids, layout = pack(tokens, [n], [range(tokens.branch_ptr[n], tokens.branch_ptr[n + 1])])
    with torch.no_grad():
        v = critic.heads.values(hidden_states(shop.model, ids, layout)[layout.readouts()[0]]).item()
    record = {key: rows[n][key] for key in ("goal", "observation", "candidates")}
    (score,) = critic.score([{**record, "history": [r["action"] for r in rows[:n]]}])
    assert score.v == pytest.approx(v, abs=1e-5)
    assert len(score.q) == len(rows[n]["candidates"])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"goal": "g"}, "input record 5: it needs `observation` or `messages`"),
        ({"goal": "g", "observation": "p", "candidates": [3]}, "input record 5: a candidate is a text"),
        ({"goal": "word " * 500, "observation": "p"}, "input record 5: .* max_tokens=200"),
    ],
)
def test_errors_name_the_record(critic, state, message):
    good = [STATES[0]] * 5
    scores = critic.score([*good, state], chunk=2)
    with pytest.raises(UserError, match=message):
        list(scores)


def test_a_folder_without_a_critic_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match=r"holds no critic.*STORE/runs/RUN_ID"):
        Critic.from_pretrained(tmp_path)


@pytest.fixture
def encoded(monkeypatch):
    """Tokens of every pass through the backbone."""
    seen = []
    encode = backbone.hidden_states

    def counted(model, ids, layout):
        seen.append(len(ids))
        return encode(model, ids, layout)

    monkeypatch.setattr(backbone, "hidden_states", counted)
    return seen


def test_equal_states_are_encoded_once(critic, encoded):
    state = {"goal": "Buy a red mug", "observation": PAGE}
    actions = ["back", "click[red mug]", "search[mug]"]
    rows = [{**state, "action": actions[i % 3]} for i in range(9)]
    rows += [state, {**state, "action": "back", "response": "I go back"}, {**state, "response": "back"}]
    rows += [{**state, "candidates": actions}] * 2
    alone = [score for row in rows for score in critic.score([row])]
    encoded.clear()
    close(list(critic.score(rows)), alone)
    together = sum(encoded)
    encoded.clear()
    list(critic.score([{**state, "candidates": [*actions, "I go back"]}, {**state, "candidates": actions}]))
    assert together == sum(encoded)


def test_what_differs_in_anything_seen_is_not_merged(critic, encoded):
    state = {"goal": "Buy a red mug", "observation": PAGE, "action": "back"}
    others = [{"url": "http://shop"}, {"observation_error": "no"}, {"history": ["a"]}, {"start_url": "http://shop"}]
    rows = [state, *({**state, **other} for other in others), {**state, "goal": None, "start_url": "http://shop"}]
    alone = [score for row in rows for score in critic.score([row])]
    one_by_one = sum(encoded)
    encoded.clear()
    close(list(critic.score(rows)), alone)
    assert sum(encoded) == one_by_one


def test_logged_ids_of_a_response_are_read_as_they_are(shop, critic):
    ids = shop.tokenizer("search[lamp]")["input_ids"]
    state = {"goal": "Buy a lamp", "observation": PAGE, "action": "back", "tokenizer_id": tokenizer_id(shop.tokenizer)}
    rows = [state, {**state, "response_token_ids": ids}, {**state, "response_token_ids": ids[:1]}]
    alone = [score for row in rows for score in critic.score([row])]
    close(list(critic.score(rows)), alone)
    assert len({round(score.q[0], 5) for score in alone}) == 3


def test_little_is_read_ahead(critic, monkeypatch):
    read = []

    def states():
        for i in range(50):
            read.append(i)
            yield {"goal": f"Buy {i}", "observation": PAGE}

    scores = critic.score(states(), chunk=8)
    next(scores)
    assert len(read) == 8
    monkeypatch.setattr(critic_module, "_CHARACTERS", 3 * len(PAGE))
    read.clear()
    next(critic.score(states(), chunk=8))
    assert len(read) == 3


def test_a_chunk_has_no_score_for_what_cannot_be_read(critic):
    first, none, last = critic.score_chunk([STATES[0], {"goal": "word " * 500, "observation": "p"}, STATES[1]])
    assert none is None
    close([first, last], list(critic.score(STATES[:2])))

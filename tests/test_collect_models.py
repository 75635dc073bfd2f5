"""Trained models that act: from logs to a run of fit, its own episodes, and back into fit, exactly."""

import asyncio
import json
import math

import numpy as np
import pytest
import torch

from offline_lm import _collect_models as models
from offline_lm import collect, fit
from offline_lm._collect_policies import named
from offline_lm._collect_rollout import Plan, Setting, play
from offline_lm.envs import sites
from offline_lm.envs.policies import Chooser, State, uniform
from offline_lm.envs.text import TextSite
from offline_lm.envs.written import Written
from offline_lm.errors import UserError
from offline_lm.models.critic import Critic
from offline_lm.policy import Policy
from offline_lm.store import Store

SMALL = [
    *("model=tiny", "model.stage.tokens=500", "model.vocab_size=400", "model.width=32", "model.layers=1"),
    *("model.attention_heads=2", "optim.batch_size=64", "optim.warmup=2", "optim.steps=5", "threads=1"),
    *("logger=none", "baselines=false", "actor.batch_size=16", "actor.warmup=1", "data.held_out=0"),
]
STEPS = """SELECT e.policy_id, e.policy_kind, e.model, e.sampling.temperature, e.extra ->> '$.sampling.over' AS over,
    e.goal, s.url, s.observation, s.action, s.response, s.prompt_token_ids, s.response_token_ids, s.response_logprobs,
    s.behavior_logprob, s.candidates, s.candidates_complete, s.tokenizer_id, s.action_error, e.episode_id, s.step
    FROM steps s JOIN episodes e USING (episode_id)
    WHERE s.action IS NOT NULL AND e.policy_id LIKE ? ORDER BY e.episode_id, s.step"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with random episodes of a shop, and two runs on them."""
    folder = str(tmp_path_factory.mktemp("models") / "store")
    shop = ["env=shop", "tasks=2", f"store={folder}"]
    assert collect.main([*shop, "policy=random", "episodes=6", "max_steps=8"]) == 0
    assert fit.main([f"data.store={folder}", *SMALL, "algo=q_mc"]) == 0
    assert fit.main([f"data.store={folder}", *SMALL, "algo=bc", "actor.steps=30", "actor.lr=1e-2"]) == 0
    return folder


def runs(store):
    with Store.open(store).connect() as db:
        return dict(
            db.execute("SELECT algo, run_id FROM runs WHERE status = 'finished' ORDER BY written_at").fetchall()
        )


def collected(store, pattern):
    with Store.open(store).connect() as db:
        found = db.execute(STEPS, [pattern])
        names = [column[0] for column in found.description]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


def play_by(store, capsys, *argv, code=0):
    shop = ["env=shop", "tasks=2", f"store={store}", "device=cpu", "json=true"]
    assert collect.main([*shop, *argv]) == code
    out, err = capsys.readouterr()
    return err if code else (json.loads(out.splitlines()[-1]), out)


def test_an_actor_among_the_actions_of_a_page_and_back_into_fit(store, capsys):
    run = runs(store)["bc"]
    told, out = play_by(store, capsys, "policy=run:latest", "temperature=2", "epsilon=0.2", "episodes=4", "pages=3")
    assert f"policy=run:latest: {run}, an actor" in out
    steps = collected(store, "pi-%")
    assert len(steps) == told["steps"]
    policy = Policy.from_pretrained(Store.open(store).run_dir(run))
    past: dict[str, list[str]] = {}
    for s in steps:
        assert (s["policy_id"], s["policy_kind"]) == (f"pi-{run}-t2-eps0.2", "llm")
        history = past.setdefault(s["episode_id"], [])
        actions = [c["action"] for c in s["candidates"]]
        state = {"goal": s["goal"], "observation": s["observation"], "url": s["url"], "history": list(history)}
        (logprobs,) = policy.logprobs([{**state, "candidates": actions}])
        p = np.exp(logprobs / 2 - np.logaddexp.reduce(logprobs / 2))
        expected = np.log(0.8 * p + 0.2 / len(p))
        np.testing.assert_allclose([c["logprob"] for c in s["candidates"]], expected, rtol=1e-4)
        np.testing.assert_allclose([c["score"] for c in s["candidates"]], logprobs, rtol=1e-4)
        taken = actions.index(s["action"])
        assert s["behavior_logprob"] == s["candidates"][taken]["logprob"]
        assert sum(s["response_logprobs"]) == pytest.approx(logprobs[taken], rel=1e-4)
        assert policy.text(s["response_token_ids"]) == s["action"] == s["response"]
        assert s["prompt_token_ids"] == policy.prompts([state])[0]
        assert (s["temperature"], s["over"]) == (2.0, "candidates")
        history.append(s["action"])
    fitted(store, capsys, run, "pi-%")


def fitted(store, capsys, run, pattern):
    """A fit of these episodes takes the logged log-probabilities; they are those of the actor that it starts from."""
    shared = ["algo=grpo", "algo.variant=dapo", f"actor.path=run:{run}", f"data.where=\"policy_id LIKE '{pattern}'\""]
    shared += ["actor.clone_first=0", "actor.steps=1", "actor.behaviour=logged", "json=true"]
    assert fit.main([f"data.store={store}", *SMALL, *shared]) == 0
    out = capsys.readouterr().out
    assert "actor.behaviour=logged" in out
    metrics = json.loads(out.splitlines()[-1])["metrics"]
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-6)


def test_an_actor_that_writes_and_back_into_fit(store, capsys):
    """Each token's log-probability is that of drawing it; what no one can read is an error, and stays."""
    run = runs(store)["bc"]
    told, _ = play_by(
        store, capsys, f"policy=run:{run}", "candidates=none", "temperature=1", "max_tokens=12", "max_steps=5",
        "episodes=6", "pages=3",
    )  # fmt: skip
    steps = collected(store, "free-%")
    assert len(steps) == told["steps"]
    assert told["failed_actions"] == sum(s["action_error"] is not None for s in steps) > 0
    policy = Policy.from_pretrained(Store.open(store).run_dir(run))
    end = policy.tokenizer.eos_token_id
    hashes = {s["model"] for s in steps}
    assert len(hashes) == 1
    assert hashes.pop().startswith(f"{run}@")
    for s in steps:
        ids = s["response_token_ids"]
        assert s["policy_id"] == f"free-{run}-t1-m12"
        assert len(ids) <= 12
        assert end not in ids[:-1]
        assert policy.text(ids) == s["response"]
        assert s["behavior_logprob"] == pytest.approx(math.fsum(s["response_logprobs"]))
        assert not s["candidates_complete"]
        (sampled,) = [c for c in s["candidates"] if c["source"] == "sampled"]
        assert (sampled["executed"], sampled["logprob"]) == (True, s["behavior_logprob"])
        assert sampled["action"] == s["action"]
        listed = [c["action"] for c in s["candidates"] if c["source"] == "enumerated"]
        assert (s["action_error"] is None) == (s["action"] not in listed and s["action"] in _page(s))
    cut = [s for s in steps if s["response_token_ids"][-1] == end]
    assert cut, "some response ends by itself"
    fitted(store, capsys, run, "free-%")


def _page(s):
    """The actions of the page, those that were meant included."""
    return {c["action"] for c in s["candidates"]} if s["action_error"] is None else ()


def test_the_number_of_pages_changes_nothing_that_is_written(store, tmp_path, capsys):
    """Samples depend on (seed, task, page, step) alone, though all pages that wait are one batch."""
    run = Store.open(store).run_dir(runs(store)["bc"])
    for pages in (1, 4):
        play_by(
            str(tmp_path / str(pages)), capsys, f"policy=lm:run:{run}", "temperature=1", "max_tokens=8", "episodes=4",
            "max_steps=3", f"pages={pages}",
        )  # fmt: skip
    one, four = (collected(str(tmp_path / str(pages)), "%") for pages in (1, 4))
    keys = ("observation", "action", "response_token_ids")
    assert [[s[key] for key in keys] for s in one] == [[s[key] for key in keys] for s in four]
    for a, b in zip(one, four, strict=True):
        np.testing.assert_allclose(a["response_logprobs"], b["response_logprobs"], atol=1e-4)


def test_best_of_n_by_a_critic_asks_it_once(store, capsys, monkeypatch):
    asked = []
    score = Critic.score

    def counting(self, states, **options):
        states = list(states)
        asked.append([len(s["candidates"]) for s in states])
        return score(self, states, **options)

    words = sorted({a for n in range(2) for actions in sites.named(f"shop0/{n}").actions for a in actions})
    monkeypatch.setattr(Critic, "score", counting)
    monkeypatch.setattr(Policy, "text", lambda self, ids: words[sum(ids) % len(words)])  # an actor that knows the shop
    known = runs(store)
    play_by(
        store, capsys, f"policy=run:{known['bc']}", "candidates=none", "temperature=1", "n=6",
        f"critic={known['q_mc']}", "max_tokens=10", "episodes=4", "pages=4", "max_steps=4",
    )  # fmt: skip
    assert max(map(len, asked)) > 1, "several pages in one call"
    steps = collected(store, "free-%best6%")
    critic = Critic.from_pretrained(Store.open(store).run_dir(known["q_mc"]))
    scored = 0
    for s in steps:
        assert (s["policy_kind"], s["behavior_logprob"]) == ("search", None)
        sampled = [c for c in s["candidates"] if c["source"] == "sampled"]
        assert 1 <= len(sampled) <= 6
        assert all(c["logprob"] < 0 for c in sampled)
        with_q = [c for c in sampled if c["score"] is not None]
        (taken,) = [c for c in s["candidates"] if c["executed"]]
        assert (taken["action"], taken["response"]) == (s["action"], s["response"])
        if with_q:
            assert taken["score"] == max(c["score"] for c in with_q)
            assert s["action_error"] is None
            scored += 1
        else:
            assert s["action_error"]
        assert math.fsum(s["response_logprobs"]) == pytest.approx(taken["logprob"])
    assert scored == sum(map(len, asked)) > 0
    with Store.open(store).connect() as db:
        ((n, extra),) = db.execute(
            "SELECT DISTINCT sampling.n, extra ->> '$.sampling.critic' FROM episodes WHERE policy_id LIKE '%best6%'"
        ).fetchall()
    assert n == 6
    assert extra.startswith(f"{known['q_mc']}@")
    assert critic.config["has_q"]


def test_a_hash_is_of_the_weights(store):
    folder = Store.open(store).run_dir(runs(store)["bc"])
    policy, model = models.actor(folder, torch.device("cpu"))
    assert model == models.actor(folder, torch.device("cpu"))[1]
    with torch.no_grad():
        next(policy.model.parameters())[0, 0] += 1e-3
    assert models._sha256(policy.model) != model.partition("@")[2]
    critic = Critic.from_pretrained(Store.open(store).run_dir(runs(store)["q_mc"]))
    before = models._sha256(critic.model, critic.heads)
    with torch.no_grad():
        next(critic.heads.parameters()).view(-1)[0] += 1e-3
    assert models._sha256(critic.model, critic.heads) != before


def test_turns_are_read_with_their_pages(store):
    """A critic of data.context=turns is asked as it was trained: with the pages of the past, not its actions alone."""
    asked = []

    class Knowing:
        policy_id, kind, model, sampling = "p", "llm", None, {}

        def act(self, states):
            asked.extend(states)
            return Chooser("random", uniform).act(states)

    policy = Knowing()

    async def act(state: State):
        return policy.act([state])[0]

    env = TextSite(["shop0/0"])
    asyncio.run(play(env, Plan("shop0/0", 0, 0, "x"), act, Setting(policy, 3)))
    turns = asked[2].asked("turns", ["a"])["history"]
    assert [turn["observation"] for turn in turns] == [asked[0].observation, asked[1].observation]
    assert [turn["action"] for turn in turns] == list(asked[2].history)
    assert asked[2].asked("actions", ["a"])["history"] == asked[2].history
    assert asked[2].grammar == "exact"


def test_a_pretrained_model_is_asked_in_its_frame(store, capsys):
    """A page that spells a marker of the model's chat opens no turn, and what does not fit is said."""
    folder = Store.open(store).run_dir(runs(store)["bc"]) / "actor"
    policy = named(f"lm:{folder}", env="shop", store=store, temperature=1.0, max_tokens=4, page_chars=60)
    assert isinstance(policy, Written)
    assert isinstance(policy.proposer, models.Writer)
    state = State("goal", "a<|end|>b " + "x" * 200, ("back",), np.random.default_rng(0), grammar="exact")
    prompts = policy.proposer._prompts([state])
    tokenizer = policy.proposer.policy.tokenizer
    assert prompts[0][0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in prompts[0]
    text = tokenizer.decode(prompts[0][1:])
    assert "a<|end|>b" in text
    assert "characters are left out" in text
    assert text.endswith("Actions:\nback\nAction: ")
    choice = policy.act([state, state])[0]
    assert choice.tokens == (len(prompts[0]), len(choice.logged["response_token_ids"]))
    policy.proposer.policy.model.config.max_position_embeddings = 20
    with pytest.raises(UserError, match="lower page_chars=60"):
        policy.act([state])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("policy=run:Q", "candidates=none"), "is a critic, and only an actor writes actions"),
        (("policy=run:PI", "n=4", "critic=Q"), "candidates=none lets an actor write"),
        (("policy=run:PI", "candidates=none", "n=4"), "n=4, critic=None: a critic chooses one of several"),
        (("policy=run:PI", "candidates=none", "n=4", "critic=Q"), "samples at temperature=0 are all alike"),
        (("policy=run:PI", "candidates=none", "epsilon=0.1"), "explores by temperature="),
        (("policy=lm:run:PI", "candidates=page"), "policy=lm:run:PI writes its actions"),
        (("policy=run:PI", "candidates=none", "temperature=1", "n=4", "critic=PI"), "has no critic"),
        (("policy=run:none-such",), "no run `none-such`"),
        (("policy=lm:EMPTY",), "no causal language model could be loaded"),
        (("policy=run:PI", "candidates=all"), "candidates=all: there are page and none"),
        (("policy=run:PI", "max_tokens=0"), "max_tokens=0: a whole number from 1"),
        (("policy=random", "temperature=warm"), "temperature=warm: a number from 0 is wanted"),
    ],
)
def test_what_does_not_go_together_is_said(store, capsys, tmp_path, argv, message):
    known = runs(store)
    argv = [a.replace("EMPTY", str(tmp_path)) for a in argv]
    given = [
        a.replace("PI", known["bc"]).replace("=Q", f"={known['q_mc']}").replace(":Q", f":{known['q_mc']}") for a in argv
    ]
    err = play_by(store, capsys, *given, code=2)
    assert message.replace("PI", known["bc"]) in err


def test_a_run_with_neither_is_refused(store, tmp_path):
    folder = tmp_path / "runs" / "empty"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match=r"neither an actor \(policy.json\) nor a critic \(critic.json\)"):
        named(f"run:{folder}", env="shop", store=store)

"""Training through the backbone, whole and small: the values in the store are those of the saved critic."""

import json

import pytest
import torch
from safetensors.torch import load_file

import offline_lm
from offline_lm import fit, ingest, paths

SMALL = [
    *("model=tiny", "model.stage.tokens=3000", "model.vocab_size=400"),
    *("model.width=32", "model.layers=2", "model.attention_heads=2"),
    *("data.where='task_id IN (SELECT DISTINCT task_id FROM episodes ORDER BY 1 LIMIT 4)'", "data.max_tokens=256"),
    *("optim.batch_tokens=4000", "optim.warmup=1", "optim.steps=3", "optim.lr=1e-2", "threads=1", "logger=none"),
    *("baselines=false", "json=true"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    sample = paths.CONF.parent / "datasets" / "shop"
    assert ingest.main([f"path={sample}", f"store={folder / 'store'}"]) == 0
    return folder / "store"


def run(store, capsys, *arguments):
    assert fit.main([f"data.store={store}", *SMALL, *arguments]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])["run_id"]


@pytest.mark.parametrize(
    "how",
    [
        ("full", "heads"),
        ("full", "ema", "model.gradient_checkpointing=true"),
        ("lora", "heads"),
        ("lora", "ema", "model.lora.layers=[q_proj,v_proj]"),
        ("full", "heads", "model.dtype=bfloat16"),
    ],
    ids="-".join,
)
def test_values_in_the_store_are_those_of_the_saved_critic(store, capsys, how):
    train, target, *more = how
    run_id = run(store, capsys, f"model.train={train}", f"model.target={target}", *more)
    db = offline_lm.connect(store)
    states = (
        db.sql(
            "SELECT r.goal, e.start_url, r.url, r.observation, r.action, r.v, r.q"
            " FROM run_values AS r JOIN episodes AS e USING (episode_id)"
            " WHERE r.run_id = ? AND r.step = 0 ORDER BY episode_id LIMIT 8",
            params=[run_id],
        )
        .to_arrow_table()
        .to_pylist()
    )
    assert len(states) == 8
    critic = offline_lm.Critic.from_pretrained(store / "runs" / run_id)
    within = 1e-5 if "model.dtype=bfloat16" not in more else 2e-2
    for state, score in zip(states, critic.score(states), strict=True):
        assert score is not None
        assert score.v == pytest.approx(state["v"], abs=within)
        assert score.q == pytest.approx([state["q"]], abs=within)
    start = next((store / "cache" / "backbones").glob("*/model.safetensors"))
    before, after = load_file(start), load_file(store / "runs" / run_id / "backbone" / "model.safetensors")
    moved = [name for name in before if not torch.equal(before[name].to(after[name].dtype), after[name])]
    trained = {name.split(".")[-2] for name in moved}
    if train == "full":
        assert {"embed_tokens", "q_proj", "down_proj", "norm"} <= trained
    elif "model.lora.layers=[q_proj,v_proj]" in more:
        assert trained == {"q_proj", "v_proj"}
    else:
        assert trained == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert not [name for name in critic.model.state_dict() if name.endswith((".up", ".down"))]


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("model.target=both", "model.target=both: one of ema, heads is wanted"),
        ("model.train=adapters", "model.train=adapters: one of heads, lora, full is wanted"),
        ("model.lora.rank=0", "model.lora.rank=0: a whole number from 1 is wanted"),
        ("model.lora.layers=[]", "model.lora.layers=[]: all or a list of names is wanted"),
        ("model.lora.layers=[c_attn]", "model.lora.layers: no linear layer is called c_attn; this model has down_proj"),
        ("optim.batch_tokens=0", "optim.batch_tokens=0: a whole number from 1 is wanted"),
    ],
)
def test_a_mistake_is_told_in_a_line(store, capsys, argument, said):
    assert fit.main([f"data.store={store}", *SMALL, "model.train=lora", argument]) == 2
    assert said in capsys.readouterr().err

"""The reader that ships: its files are those that its card describes, and every command takes it."""

import hashlib
import json
import re

import orjson
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import offline_lm
from offline_lm import fit, ingest
from offline_lm.batches import render
from offline_lm.envs.shop import Site, Task, record
from offline_lm.models import backbone, pretraining
from offline_lm.models.critic import Critic
from offline_lm.paths import READER

SMALL = [
    *("algo=q_mc", "model=reader", "model.stage.batch_tokens=1000", "data.max_tokens=200", "optim.steps=10"),
    *("optim.batch_size=64", "optim.warmup=2", "threads=1", "logger=none", "baselines=false", "json=true"),
]


@pytest.fixture(scope="module")
def reader():
    return backbone.load("reader", "float32")


def test_the_card_has_the_hash_of_the_weights_and_they_are_small():
    weights = (READER / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() in (READER / "README.md").read_text()
    assert sum(file.stat().st_size for file in READER.iterdir()) < 12e6


def test_the_card_has_as_many_parameters_as_the_weights(reader):
    said = re.search(r"([0-9.]+) M parameters", (READER / "README.md").read_text())
    assert said is not None
    assert float(said[1]) == pytest.approx(sum(p.numel() for p in reader[0].parameters()) / 1e6, abs=0.05)


def test_plain_transformers_reads_it(reader):
    model = AutoModelForCausalLM.from_pretrained(READER, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(READER)
    ids = tokenizer("Page:\nA red mug\nGoal: buy it", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()
    assert tokenizer.decode(tokenizer("naïve 日本 €9\x00").input_ids) == "naïve 日本 €9\x00"


def test_its_tokenizer_has_one_token_for_each_word_that_opens_a_part(reader):
    _, tokenizer = reader
    assert all(len(tokenizer(word, add_special_tokens=False).input_ids) == 1 for word in render.MARKS)
    assert render.frame(tokenizer).before == backbone.START


def test_it_knows_which_of_two_goals_names_what_the_page_shows(reader):
    """Asked as it was trained: of 200 simple pages with made-up words, read by a line fitted on 200 others."""
    model, tokenizer = reader

    @torch.no_grad()
    def read(number):
        row = pretraining.sheet(tokenizer, 10**6, number, easy=1.0, grounded=True, tokens=16_000)
        hidden = backbone.hidden_states(model.eval(), row.ids, row.layout)[row.layout.readouts()[0]]
        known = ~row.met.isnan()
        return hidden[known].double(), row.met[known].double()

    (x, y), (x_test, y_test) = read(0), read(1)
    mean, std = x.mean(0), x.std(0)
    x, x_test = (x - mean) / std, (x_test - mean) / std
    penalty = 0.1 * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    line = torch.linalg.solve(x.T @ x + penalty, x.T @ (y - y.mean()))
    right = ((x_test @ line + y.mean() > 0.5) == (y_test > 0.5)).double().mean().item()
    always = max(y_test.mean().item(), 1 - y_test.mean().item())
    assert right > always + 0.15


@pytest.mark.parametrize("tokens", [0, 3000])
def test_a_run_keeps_the_backbone_that_it_read_with(tmp_path, capsys, tokens):
    """Also where it is the reader as it ships: the next version of the package may bring another."""
    log, store = tmp_path / "shop.jsonl", tmp_path / "store"
    log.write_bytes(b"\n".join(orjson.dumps(e) for e in record([Task(Site.draw(3), i) for i in range(5)], 2)))
    assert ingest.main([f"path={log}", f"store={store}"]) == 0
    assert fit.main([*SMALL, f"model.stage.tokens={tokens}", f"data.store={store}"]) == 0
    run = store / "runs" / json.loads(capsys.readouterr().out.splitlines()[-1])["run_id"]
    kept, _ = backbone.load(str(run / "backbone"), "float32")
    shipped, _ = backbone.load("reader", "float32")
    same = [torch.equal(a, b) for a, b in zip(kept.parameters(), shipped.parameters(), strict=True)]
    assert all(same) == (tokens == 0)
    db = offline_lm.connect(store)
    goal, page, value = db.execute("SELECT goal, observation, v FROM latest_values WHERE step = 0").fetchone() or (
        "",
        "",
        0,
    )
    (score,) = Critic.from_pretrained(run).score([{"goal": goal, "observation": page}])
    assert score.v == pytest.approx(value, abs=1e-4)

"""The command that pretrains the reader, whole and small: files that load, the same ones again, also after Ctrl-C."""

import csv
import hashlib
import json
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from offline_lm import pretrain
from offline_lm.models import backbone, pretraining

SMALL = [
    *("tokens=6000", "batch_tokens=600", "width=40", "layers=2", "heads=1", "vocab_size=600", "held_out=5"),
    "json=true",
]
FEW = 100
FILES = {"config.json", "curves.csv", "generation_config.json", "model.safetensors", "tokenizer.json"}


@pytest.fixture(autouse=True)
def few_texts(monkeypatch):
    texts = pretraining.texts
    monkeypatch.setattr(pretraining, "texts", lambda seed, n: texts(seed, FEW))


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A folder, and what was printed."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("pretrain") / "reader"
    with pytest.MonkeyPatch.context() as patch:
        texts, printed = pretraining.texts, []
        patch.setattr(pretraining, "texts", lambda seed, n: texts(seed, FEW))
        patch.setattr("builtins.print", lambda *parts, **_: printed.append(parts[0]))
        assert pretrain.main([f"output={folder}", *SMALL]) == 0
    return folder, printed


def table(folder):
    with (folder / "curves.csv").open(newline="") as file:
        return list(csv.reader(file))


def test_its_files_load_in_transformers_and_in_fit(first):
    folder, _ = first
    assert {file.name for file in folder.iterdir()} - {"tokenizer_config.json", "special_tokens_map.json"} == FILES
    weights = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    assert all(weight.isfinite().all() for weight in weights.values())
    plain = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    tokens = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokens("<|start|>Page:\na red mug\nGoal: a mug\nAction: ")["input_ids"]])
    model, tokenizer = backbone.load(str(folder), "float32")
    assert tokenizer("a red mug")["input_ids"] == tokens("a red mug")["input_ids"]
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (40, 2)
    packed = backbone.hidden_states(model, ids[0], backbone.Layout.of([ids.shape[1]], [[]]))
    with torch.no_grad():
        torch.testing.assert_close(packed, plain.base_model(ids).last_hidden_state[0], rtol=0, atol=1e-4)


def test_what_it_prints_is_what_it_wrote(first):
    folder, printed = first
    found = json.loads(printed[-1])
    assert set(found) == {"sha256", "minutes", "right"}
    assert found["sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert 0 < found["minutes"] < 2
    assert set(found["right"]) <= {"pick", "place", "look_up", "count", "detail", "done", "form", "menu", "trail"}
    assert all(0 <= share <= 1 for share in found["right"].values())
    assert [line.split()[0] for line in printed[:-2]] == list(found["right"])


def test_its_curves_are_a_table_of_means(first):
    header, *rows = table(first[0])
    assert header == ["tokens", "kind", "name", "mean"]
    assert sorted({int(row[0]) for row in rows}) == [600 * i for i in range(1, 11)]
    losses = {row[2] for row in rows if row[1] == "loss"}
    assert losses == {"right", "choice", "met", "which", "grade", "seen", "said"}
    assert all(0 <= float(row[3]) <= 1 for row in rows if row[1] == "right")


def test_the_seed_decides_the_file_also_after_an_interruption(first, tmp_path, capsys, monkeypatch):
    folder, printed = first
    step = pretrain.Curves.step

    def interrupted(self, update, *told):
        step(self, update, *told)
        if update == 7:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain.Curves, "step", interrupted)
        assert pretrain.main([f"output={tmp_path}", *SMALL]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".csv", ".state"]
    assert table(tmp_path)[-1][0] == "4200"  # the seventh update was told, but not kept

    assert pretrain.main([f"output={tmp_path}", "seed=1", *SMALL]) == 2  # other settings do not throw it away
    assert "holds a training that was stopped under other settings" in capsys.readouterr().err

    assert pretrain.main([f"output={tmp_path}", *SMALL]) == 0
    again, before = (json.loads(text) for text in (capsys.readouterr().out.splitlines()[-1], printed[-1]))
    assert {**again, "minutes": 0} == {**before, "minutes": 0}
    assert (tmp_path / "curves.csv").read_bytes() == (folder / "curves.csv").read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in folder.iterdir()}

    short = [*SMALL, "tokens=1200", "seed=1"]  # into the same folder: all is begun anew
    assert pretrain.main([f"output={tmp_path}", *short]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["sha256"] != before["sha256"]
    assert {row[0] for row in table(tmp_path)[1:]} == {"600", "1200"}


def test_it_goes_on_from_a_model_that_is_there(first, tmp_path, capsys):
    folder, printed = first
    later = [*SMALL, f"start={folder}", "tokens=1200", "lr=1e-12", "width=64", "dtype=float32"]
    assert pretrain.main([f"output={tmp_path}", *later]) == 0
    ours, start = (load_file(f / "model.safetensors") for f in (tmp_path, folder))
    assert ours.keys() == start.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, start[name].float(), rtol=0, atol=1e-6)
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["sha256"] != json.loads(printed[-1])["sha256"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("tokns=1", "no key `tokns` in pretrain; did you mean tokens"),
        ("tokens=1e6", "tokens=1000000.0: a whole number from 1 is wanted"),
        ("batch_tokens=1", "batch_tokens=1: a whole number from 2 is wanted"),
        ("seed=-1", "seed=-1: a whole number from 0 is wanted"),
        ("easy=0", "easy=0: a number above 0 is wanted, at most 1"),
        ("lr=0", "lr=0: a number above 0 is wanted\n"),
        ("grounding=1.5", "grounding=1.5: a number from 0 to 1 is wanted"),
        ("start=nowhere", "start=nowhere: no causal language model could be loaded"),
        ("heads=3", "width=40: a multiple of twice heads=3 is wanted"),
        ("heads=20", "width=40: a multiple of twice heads=20 is wanted, 4 a head at least"),
        ("dtype=float8", "dtype=float8: float32, float16 or bfloat16 is wanted"),
        ("device=abacus", "device=abacus: "),
        ("output=FILE/reader", "FILE/reader cannot be written: "),
    ],
)
def test_a_mistake_is_told_before_the_work_begins(tmp_path, capsys, monkeypatch, argument, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    monkeypatch.setattr(pretraining, "train", lambda *_, **__: pytest.fail("begun"))
    assert pretrain.main(["output=reader", *SMALL, argument]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1

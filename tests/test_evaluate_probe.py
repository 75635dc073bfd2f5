"""`evaluate suite=probe` from end to end, on few pages."""

import json

import pytest

from offline_lm import evaluate
from offline_lm.models.critic import Critic
from offline_lm.models.heads import Heads

FEW = ("suite=probe", "seeds=[0]", "probe.n_train=5", "probe.n_test=2", "probe.device=cpu")


def test_every_backbone_has_a_row(tmp_path, capfd, shop):
    """A run's own backbone is what its folder holds: probed under either name it is worth the same."""
    heads = Heads(16, hidden=8)
    config = {"max_tokens": 400, "history": 2, "dtype": "float32", "has_q": True}
    Critic(shop.model, shop.tokenizer, heads, config).save(tmp_path, backbone_path=None)
    names = ["tiny", f"run:{tmp_path}", f"{tmp_path}/backbone"]
    assert evaluate.main([*FEW, f"probe.backbones={json.dumps(names)}", "probe.styles=[plain,html]", "json=true"]) == 0
    *table, last = capfd.readouterr().out.splitlines()
    found = json.loads(last)
    assert list(found["probe"]) == ["bag of words", *names]
    run, folder = (found["probe"][name] for name in names[1:])
    assert run == folder
    assert set(run) == {
        "match", "match_action", "match_action_hit", "lookup", "lookup_hit", "compare", "negate", "count", "order",
        "sensitivity",
    }  # fmt: skip
    assert all(0 <= share <= 1 for name, share in run.items() if name != "sensitivity")
    p = run["lookup"]
    assert found["standard_error"][names[1]]["lookup"] == pytest.approx((p * (1 - p) / 4) ** 0.5)
    assert list(found["styles"]["tiny"]) == ["plain", "html"]
    both = [found["styles"]["tiny"][style]["compare"] for style in ("plain", "html")]
    assert sum(both) / 2 == pytest.approx(found["probe"]["tiny"]["compare"])
    assert any(line.startswith("goal ") and line.split()[1:] == ["95", "95", "95", "90"] for line in table)
    assert any(line.startswith("tiny: reaches the goal in") for line in table)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("probe.backbones=[nowhere/nothing/here]", "nowhere/nothing/here: no causal language model"),
        ('probe.backbones=["run:r1"]', "no store at"),
        ("probe.backbones=tiny", "probe.backbones=tiny: a list"),
        ("probe.styles=[latex]", "a list of plain, axtree, aria, html"),
        ("probe.n_train=4", "probe.n_train=4: a whole number of pages from 5"),
        ("probe.n_test=0", "probe.n_test=0"),
    ],
)
def test_mistakes(setting, message, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert evaluate.main([*FEW, setting]) == 2
    assert message in capfd.readouterr().err

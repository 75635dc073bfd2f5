"""Pretraining on generated pages: what a row holds, what is asked of it, and that training goes on where it stopped."""

import math
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from offline_lm.batches import render
from offline_lm.models import backbone, pretraining
from offline_lm.models.pretraining import Judge, choice_loss, chosen, loss, sheet, train

SIZE = {"vocab_size": 600, "width": 40, "layers": 2, "heads": 1}


@pytest.fixture(scope="module")
def tokenizer():
    torch.set_num_threads(1)
    return backbone.tiny(pretraining.texts(0, 100), **SIZE)[1]


def made(heads=1):
    """A new small model; its tokenizer is of few texts, for only its size counts."""
    return backbone.tiny(pretraining.texts(0, 100), **{**SIZE, "heads": heads})[0]


@pytest.fixture(scope="module")
def drawn(tokenizer):
    return sheet(tokenizer, 0, 3, easy=0.05, grounded=True, tokens=1500)


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_choice_loss_by_hand():
    logits = torch.tensor([2.0, 0.0, 1.0, 3.0, 3.0, 5.0, 7.0, 1.0, 1.0, 1.0, -1.0])
    right = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    question = torch.tensor([0, 0, 0, 1, 1, 2, 2, 4, 4, 4, 4])
    e = math.e
    # 1 has no wrong one, 2 no right one, 3 and 5 none at all
    first = -math.log(e**2 / (e**2 + 1 + e))
    last = -math.log(2 * e / (3 * e + 1 / e))
    assert choice_loss(logits, right, question, 6).item() == pytest.approx((first + last) / 2, rel=1e-6)
    # a constant changes nothing, not even where exp would overflow
    assert choice_loss(logits + 1e3, right, question, 6).item() == pytest.approx((first + last) / 2, rel=1e-4)
    some = (question == 1) | (question == 2)
    assert choice_loss(logits[some], right[some], question[some], 6).item() == 0.0


def test_choice_loss_and_its_gradient_are_those_of_softmaxes_in_float64():
    g = torch.Generator().manual_seed(0)
    question = torch.randint(12, (60,), generator=g)
    right = torch.randint(2, (60,), generator=g).double()
    logits = (3 * torch.randn(60, generator=g, dtype=torch.float64)).requires_grad_()
    parts = []
    for q in range(12):
        mine = question == q
        if 0 < right[mine].sum() < mine.sum():
            parts.append(-logits[mine].softmax(0)[right[mine] > 0].sum().log())
    assert 6 < len(parts) < 12
    expected = torch.stack(parts).mean()
    got = choice_loss(logits.float(), right.float(), question, 12)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    (ours,), (theirs,) = torch.autograd.grad(got, logits), torch.autograd.grad(expected, logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_before_training_every_part_is_a_coin_toss_or_a_choice_at_random(tokenizer, drawn):
    """With heads that say 0, and a model whose words are all as likely."""
    model, judge = made(), Judge(40)
    model.lm_head.weight.zero_()
    for p in judge.parameters():
        p.zero_()
    parts, logits = loss(model, judge, drawn)
    shares = []
    for q in range(len(drawn.skill)):
        right = drawn.right[drawn.question == q]
        if 0 < right.sum() < len(right):
            shares.append(-right.mean().log().item())
    fitting = [m for s in drawn.scene.unique() if (m := _known(drawn.met[drawn.scene == s])).unique().numel() == 2]
    by_hand = {
        "right": math.log(2), "met": math.log(2), "grade": 0.3 * math.log(2), "said": 0.1 * math.log(len(tokenizer)),
        "seen": math.log(2),
        "choice": np.mean(shares), "which": np.mean([-m.mean().log().item() for m in fitting]),
    }  # fmt: skip
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(by_hand, rel=1e-5)
    assert logits.shape == drawn.right.shape


def _known(x: Tensor) -> Tensor:
    return x[~x.isnan()]


def test_what_a_short_row_does_not_ask_costs_nothing(drawn):
    model, judge = made(), Judge(40)
    none = replace(drawn, met=torch.full_like(drawn.met, torch.nan), grade=torch.full_like(drawn.grade, torch.nan))
    parts, _ = loss(model, judge, none)
    whole, _ = loss(model, judge, drawn)
    assert {name for name, part in parts.items() if part.item() == 0.0} == {"met", "which", "grade"}
    assert all(torch.equal(parts[name], whole[name]) for name in ("right", "choice", "seen", "said"))
    gradients = torch.autograd.grad(torch.stack(list(parts.values())).sum(), list(judge.right.parameters()))
    assert all(g.isfinite().all() for g in gradients)


def test_chosen_is_the_best_action_of_each_question(drawn):
    logits = torch.where(drawn.right > 0, 1.0, 0.0)
    assert chosen(logits, drawn) == [(skill, True) for skill in drawn.skill]
    wrong = [q for q in range(len(drawn.skill)) if (drawn.right[drawn.question == q] == 0).any()]
    assert len(wrong) > len(drawn.skill) / 2
    assert [ok for _, ok in chosen(-logits, drawn)] == [q not in wrong for q in range(len(drawn.skill))]


# -- rows --------------------------------------------------------------------------------------------------------------


def test_a_row_is_a_function_of_its_arguments(tokenizer, drawn):
    torch.manual_seed(1)
    again = sheet(tokenizer, 0, 3, easy=0.05, grounded=True, tokens=1500)
    for f in fields(drawn):
        one, other = getattr(drawn, f.name), getattr(again, f.name)
        if isinstance(one, Tensor):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=f.name)
    assert again.skill == drawn.skill
    assert torch.equal(again.layout.positions(), drawn.layout.positions())
    assert 1500 <= len(drawn.ids) < 3000
    for changed in ((1, 3), (0, 4)):
        other = sheet(tokenizer, *changed, easy=0.05, grounded=True, tokens=1500).ids[:200]
        assert not torch.equal(other, drawn.ids[:200])


def test_an_action_that_names_a_number_is_read_with_its_line(tokenizer):
    """The same page, goals and questions; behind a number stands its line, and a token of it may stand in the goal."""
    alone = sheet(tokenizer, 0, 3, easy=0.05, grounded=False, tokens=1500)
    row = sheet(tokenizer, 0, 3, easy=0.05, grounded=True, tokens=len(alone.ids))
    common = len(alone.skill)
    assert row.skill[:common] == alone.skill
    (_, acts, sizes), (_, bare, own) = sequences(row), sequences(alone)
    longer = 0
    for act, size, before, n in zip(acts, sizes, bare, own, strict=False):
        text, said = (tokenizer.decode(r.ids[a[-k:]]) for r, a, k in ((row, act, size), (alone, before, n)))
        end = tokenizer.eos_token
        name, _, line = text.removesuffix(end).partition(" # ")
        assert name == said.removesuffix(end).partition(" # ")[0]
        if line:
            longer += 1
            assert line in tokenizer.decode(row.ids[act[:-size]])
    assert 10 < longer < len(bare)


def sequences(drawn):
    """Each (page, goal, action) as places in the row, worked out from the layout's sizes alone."""
    sizes, parents, owners = drawn.layout.sizes.tolist(), drawn.layout.parent.tolist(), drawn.layout.owner.tolist()
    at, trunks, segments = 0, [], []
    for s, trunk in enumerate(drawn.layout.trunks.tolist()):
        trunks.append(list(range(at, at + trunk)))
        at += trunk
        for size, owner in zip(sizes, owners, strict=True):
            if owner == s:
                segments.append(list(range(at, at + size)))
                at += size
    assert at == len(drawn.ids)
    goals = [trunks[owners[g]] + segments[g] for g in range(len(sizes)) if parents[g] < 0]
    acts = [trunks[owners[g]] + segments[p] + segments[g] for g, p in enumerate(parents) if p >= 0]
    return goals, acts, [len(segments[g]) for g, p in enumerate(parents) if p >= 0]


def test_goals_and_actions_are_read_at_their_last_tokens_and_are_prompts_as_fit_makes_them(tokenizer, drawn):
    goals, acts, sizes = sequences(drawn)
    prompts, branches = (at.tolist() for at in drawn.layout.readouts())
    assert prompts == [goal[-1] for goal in goals]
    assert branches == [act[-1] for act in acts]
    assert len(goals) == len(drawn.met) == len(drawn.skill) == len(drawn.scene)
    assert len(acts) == len(drawn.right) == len(drawn.grade) == len(drawn.question)
    assert (drawn.ids[prompts] == drawn.ids[prompts[0]]).all()
    assert (drawn.ids[branches] == tokenizer.eos_token_id).all()
    for act, q, size in zip(acts, drawn.question.tolist(), sizes, strict=True):
        assert act[:-size] == goals[q]  # under the goal that it is judged under
        prompt, action = (tokenizer.decode(drawn.ids[at]) for at in (act[:-size], act[-size:]))
        assert prompt.startswith(tokenizer.bos_token)
        assert "\nGoal: " in prompt.partition("Page:\n")[2]
        assert prompt.endswith("\nAction: ")
        assert action.endswith(tokenizer.eos_token)
        assert tokenizer.bos_token not in prompt[1:] + action
    assert render.frame(tokenizer).before == tokenizer.bos_token


def test_said_is_every_token_of_the_right_actions_each_at_the_place_before_it(drawn):
    _, acts, sizes = sequences(drawn)
    expected = [
        (before, int(drawn.ids[place]))
        for act, size, right in zip(acts, sizes, drawn.right.tolist(), strict=True)
        if right
        for before, place in pairwise(act[-size - 1 :])
    ]
    assert [tuple(pair) for pair in drawn.said.tolist()] == expected
    assert len(expected) > 50


def test_a_packed_row_equals_one_sequence_at_a_time(tokenizer):
    """Readouts and the gradient of the whole loss, against plain `transformers` on each (page, goal, action)."""
    row = sheet(tokenizer, 0, 5, easy=0.05, grounded=True, tokens=300)
    goals, acts, _ = sequences(row)
    model, judge = made(heads=2), Judge(40)
    packed = torch.stack(backbone.halfway_and_last(model, row.ids, row.layout))
    assert torch.equal(packed[1], backbone.hidden_states(model, row.ids, row.layout))
    plain = made(heads=2)
    plain.set_attn_implementation("eager")
    alone = torch.zeros_like(packed).detach()
    for act in acts:
        out = plain.base_model(input_ids=row.ids[act][None], use_cache=False, output_hidden_states=True)
        hidden = torch.stack([out.hidden_states[len(plain.model.layers) // 2][0], out.last_hidden_state[0]])
        alone = alone.index_copy(1, torch.tensor(act), hidden)
    assert set().union(*map(set, goals)) <= set().union(*map(set, acts))
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)

    def gradient(m, hidden):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pretraining, "halfway_and_last", lambda *_: hidden)
            parts, _ = loss(m, judge, row)
        named = [p for _, p in sorted(m.named_parameters())]
        return torch.autograd.grad(torch.stack(list(parts.values())).sum(), named)

    ours, theirs = gradient(model, packed), gradient(plain, alone)
    assert max(g.abs().max().item() for g in theirs) > 0.1
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


def test_a_token_is_seen_where_it_and_the_one_before_it_stand_so_in_what_it_is_compared_with(tokenizer, drawn):
    ids, trunks = drawn.ids.tolist(), drawn.layout.trunks.tolist()
    goals, acts, sizes = sequences(drawn)
    after = len(tokenizer("\nAction: ", add_special_tokens=False).input_ids)
    texts = [(goal[trunks[s] :], goal[: trunks[s]], after) for goal, s in zip(goals, drawn.scene.tolist(), strict=True)]
    for act, size, q in zip(acts, sizes, drawn.question.tolist(), strict=True):
        texts.append((act[-size:], texts[q][0], 0))
    expected = {}
    for text, other, rest in texts:
        pairs = {(ids[i], ids[j]) for i, j in pairwise(other)}
        expected |= {j: (ids[i], ids[j]) in pairs for i, j in pairwise(text[: len(text) - rest])}
    assert {place: bool(seen) for place, seen in drawn.seen.tolist()} == expected
    assert 0.02 < np.mean([*expected.values()]) < 0.9


# -- training ----------------------------------------------------------------------------------------------------------


def trained(tokenizer, at, *, updates, stop=None, lr=3e-3):
    """Model, head and what was told; stopped as by Ctrl-C after some updates."""
    model, seen = made(), []

    def on_step(update, of, parts, answered):
        seen.append((update, of, parts, list(answered)))
        if update == stop:
            raise KeyboardInterrupt

    judge = train(
        model, tokenizer, tokens=600 * updates, batch_tokens=600, easy=0.5, grounding=0.5, lr=lr, seed=0, at=at,
        on_step=on_step,
    )  # fmt: skip
    return model, judge, seen


def test_some_tens_of_updates_lower_the_loss(tokenizer, tmp_path):
    _, _, seen = trained(tokenizer, tmp_path / "state", updates=60)
    assert [(update, of) for update, of, _, _ in seen] == [(i + 1, 60) for i in range(60)]
    early, late = (
        {name: np.mean([parts[name] for _, _, parts, _ in part]) for name in seen[0][2]}
        for part in (seen[:10], seen[-10:])
    )
    gain = {name: late[name] / early[name] for name in early}
    assert gain["said"] + gain["seen"] < 1.9, gain
    assert {skill for _, _, _, answered in seen for skill, _ in answered} >= {"pick", "menu", "trail"}


def test_stopped_and_gone_on_training_ends_in_the_same_weights_bit_for_bit(tokenizer, tmp_path):
    whole, judge, seen = trained(tokenizer, tmp_path / "whole", updates=12)
    with pytest.raises(KeyboardInterrupt):
        trained(tokenizer, tmp_path / "part", updates=12, stop=8)
    again, other, rest = trained(tokenizer, tmp_path / "part", updates=12)
    assert rest == seen[7:]  # the eighth was not kept: it is done again
    for one, two in ((whole, again), (judge, other)):
        weights = two.state_dict()
        assert all(torch.equal(weight, weights[name]) for name, weight in one.state_dict().items())
    untrained = made().state_dict()
    assert not any(torch.equal(weight, untrained[name]) for name, weight in whole.state_dict().items())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["part", "whole"]


def test_the_state_is_kept_after_every_hundredth(tokenizer, tmp_path, monkeypatch):
    kept, row = [], sheet(tokenizer, 0, 0, easy=1.0, grounded=False, tokens=50)
    monkeypatch.setattr(torch, "save", lambda state, file: (kept.append(state["updates"]), file.touch()))
    monkeypatch.setattr(pretraining, "sheet", lambda *_, **__: row)
    monkeypatch.setattr(pretraining, "loss", lambda *modules: ({"sum": _total(*modules[:2])}, row.right))
    trained(tokenizer, tmp_path / "state", updates=130)
    assert kept == [math.ceil(1.3 * i) for i in range(1, 101)]


def _total(*modules):
    return torch.stack([p.sum() for module in modules for p in module.parameters()]).sum()


def test_training_that_runs_away_is_told_and_the_generator_is_left_alone(tokenizer, tmp_path):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    trained(tokenizer, tmp_path / "one", updates=1)
    assert torch.equal(torch.rand(1), expected)
    with pytest.raises(FloatingPointError, match=r"lower lr"):
        trained(tokenizer, tmp_path / "two", updates=20, lr=1e30)

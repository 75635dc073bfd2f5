import subprocess
import sys

import numpy as np
import pytest
import torch

from offline_lm.errors import UserError
from offline_lm.types import Batch

WIDTH = 6


@pytest.fixture(scope="session")
def d3():
    """Imported once: it takes seconds."""
    from offline_lm.interop import d3rlpy

    return d3rlpy


def _batch(episodes, **over):
    """`episodes`: strings of a row each: . an ordinary step, T one that terminates, F a final observation,
    L a last step with no final observation behind it, ? one whose reward is unknown."""
    rows = "".join(episodes)
    n = len(rows)
    generator = torch.Generator().manual_seed(0)
    states, actions = torch.randn(2, n, WIDTH, generator=generator)
    kind = np.array(list(rows))
    columns = {
        "offsets": torch.tensor(np.cumsum([0, *map(len, episodes)])),
        "reward": torch.where(torch.from_numpy((kind == "F") | (kind == "?")), 0.0, torch.arange(n) + 1.0),
        "continues": torch.from_numpy(kind != "T").float(),
        "returns": torch.zeros(n),
        "acted": torch.from_numpy(kind != "F"),
        "return_mask": torch.ones(n, dtype=torch.bool),
        "bootstrap_mask": torch.from_numpy((kind == ".") | (kind == "T")),
        "candidates": states[:0],
        "target_candidates": states[:0],
        "candidate_of": torch.zeros(0, dtype=torch.long),
    }
    return Batch(states, actions, states, actions, **(columns | over))


def test_episodes_have_our_transitions_and_rewards(d3):
    #           rows 0..2, 3..6,   7..8, 9,   10..12, 13..18
    batch = _batch(["..T", "..TF", "..L"[1:], "L", "..F", "..?..T"])
    data = d3.dataset(batch)
    got = [(e.size(), bool(e.terminated), e.transition_count, e.rewards[:, 0].tolist()) for e in data.episodes]
    assert got == [
        (3, True, 3, [1, 2, 3]),
        (3, True, 3, [4, 5, 6]),  # the final observation behind a terminal is left out
        (2, False, 1, [8, 9]),  # its last step has no next state
        # an episode of one such step has nothing to learn from
        (3, False, 2, [11, 12, 0]),  # truncated, with its final observation
        (3, False, 2, [14, 15, 0]),  # up to the unknown reward, and from behind it
        (3, True, 3, [17, 18, 19]),
    ]
    assert data.transition_count == int((batch.acted & batch.bootstrap_mask).sum()) == 14
    assert [e.compute_return() for e in data.episodes][:2] == [6, 15]
    assert data.dataset_info.action_size == WIDTH


def test_transitions_carry_our_features(d3):
    batch = _batch(["..T", "..F"])
    data = d3.dataset(batch)
    first, second = data.episodes
    pick = data.transition_picker
    assert np.array_equal(pick(first, 0).observation, batch.states[0])
    assert np.array_equal(pick(first, 0).next_observation, batch.states[1])
    assert np.array_equal(pick(first, 1).action, batch.actions[1])
    assert pick(first, 2).terminal == 1
    assert np.array_equal(pick(second, 1).next_observation, batch.states[5])  # the final observation
    assert pick(second, 1).terminal == 0


def test_nothing_usable(d3):
    with pytest.raises(UserError, match="nothing to learn from"):
        d3.dataset(_batch(["L", "L"]))


def test_iql_has_our_networks(d3):
    from offline_lm.models.heads import Heads

    algo = d3.create("IQL", gamma=0.9, tau=0.7, polyak=0.02, hidden=8, ensemble=3, batch_size=4)
    algo.build_with_dataset(d3.dataset(_batch(["..T"])))
    assert (algo.config.gamma, algo.config.expectile, algo.config.tau) == (0.9, 0.7, 0.02)
    modules = algo.impl.modules
    ours = Heads(WIDTH, hidden=8, ensemble=3)
    for theirs, own in ((modules.q_funcs, ours.q), (modules.value_func, ours.v)):
        assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in own.parameters())
    states, actions = torch.randn(2, 5, WIDTH)
    q = modules.q_funcs[0]
    assert torch.equal(q(states, actions).q_value, q(torch.zeros_like(states), actions).q_value)
    assert not torch.equal(q(states, actions).q_value, q(states, actions.flip(0)).q_value)


def test_iql_learns_the_value_of_a_terminal_reward(d3):
    batch = _batch(["T"] * 8, reward=torch.tensor([1.0, 0.0] * 4))
    algo = d3.create("IQL", lr=1e-2, batch_size=16, hidden=16)
    data = d3.dataset(batch)
    algo.build_with_dataset(data)
    losses = [algo.update(data.sample_transition_batch(16))["q_loss"] for _ in range(60)]
    assert losses[-1] < 0.1 * losses[0]
    q = algo.predict_value(batch.states.numpy(), batch.actions.numpy())
    assert q == pytest.approx(batch.reward.numpy(), abs=0.3)


def test_importing_leaves_logging_as_it_was():
    code = (
        "import logging; before = (list(logging.root.handlers), logging.root.level)\n"
        "import offline_lm.interop.d3rlpy\n"
        "assert (logging.root.handlers, logging.root.level) == before, logging.root.handlers"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["IQL", "TD3PlusBC"])
def test_networks_become_heads(d3, name):
    from offline_lm.models.heads import Heads

    batch = _batch(["..T", ".L", "T"])
    algo = d3.create(name, hidden=8, width=WIDTH)
    losses = [d3.update(algo, batch, step) for step in range(1, 4)]
    assert all(np.isfinite(list(one.values())).all() for one in losses)
    heads = Heads(WIDTH, hidden=8)
    v = heads.values(batch.states)
    d3.read(algo, heads)
    theirs = algo.predict_value(batch.states.numpy(), batch.actions.numpy())  # the mean of the ensemble
    assert heads.q_values(batch.actions).mean(0).tolist() == pytest.approx(theirs.tolist(), abs=1e-6)
    torch.testing.assert_close(heads.q_values(batch.actions), d3.q_values(algo, batch.actions))
    own = algo.impl.modules.value_func(batch.states)[:, 0] if name == "IQL" else v
    torch.testing.assert_close(heads.values(batch.states), own)


def test_an_update_is_on_transitions_with_a_target_alone(d3):
    """As on the same rows without the others; what is unknown must not reach it."""
    whole, known = _batch([".T", "F", "T"]), _batch([".T", "T"])
    picked = torch.tensor([0, 1, 3])
    for name in ("states", "actions", "reward"):
        getattr(known, name)[:] = getattr(whole, name)[picked]
    whole.reward[2] = float("nan")
    outcomes = []
    for batch in (whole, known):
        torch.manual_seed(0)
        algo = d3.create("IQL", hidden=8, width=WIDTH)
        outcomes.append(d3.update(algo, batch, 1)["q_loss"])
    assert outcomes[0] == pytest.approx(outcomes[1])


def test_a_batch_without_a_target_changes_nothing(d3):
    algo = d3.create("IQL", hidden=8, width=WIDTH)
    before = d3.q_values(algo, torch.ones(1, WIDTH))
    assert d3.update(algo, _batch(["L", "F"]), 1) == {}
    assert torch.equal(d3.q_values(algo, torch.ones(1, WIDTH)), before)


def test_a_field_that_its_configuration_lacks_is_told(d3):
    for name in ("alpha", "n_critics"):
        with pytest.raises(UserError, match=f"IQL of d3rlpy takes no option {name}: there are"):
            d3.create("IQL", **{name: 2})

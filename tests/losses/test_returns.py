"""Returns, advantages and bootstrapping, against numbers worked by hand and a plain loop."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from offline_lm.losses.returns import (
    _scan,
    bootstrap_mask,
    discounted_returns,
    gae,
    lambda_returns,
    n_step_returns,
    next_values,
    reverse_scan,
    td_residuals,
)

NAN = float("nan")


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def loop(a, b, offsets, last):
    """The recurrence as one writes it first."""
    x = [0.0] * len(b)
    for e in range(len(offsets) - 1):
        following = last[e]
        for t in reversed(range(offsets[e], offsets[e + 1])):
            x[t] = following = b[t] + a[t] * following
    return x


@st.composite
def ragged(draw):
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n = sum(lengths)
    rewards = torch.randn(n, generator=generator, dtype=torch.float64)
    continues = (torch.rand(n, generator=generator) < 0.8).double()
    values, after = torch.randn(2, n, generator=generator, dtype=torch.float64)
    last = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    return offsets_of(lengths), rewards, continues, values, after, last


@settings(deadline=None)
@given(ragged(), st.floats(0, 1))
def test_scan_agrees_with_a_loop(data, gamma):
    offsets, rewards, continues, _, _, last = data
    got = discounted_returns(rewards, continues, offsets, gamma=gamma, bootstrap=last)
    want = loop((gamma * continues).tolist(), rewards.tolist(), offsets.tolist(), last.tolist())
    assert_close(got, torch.tensor(want, dtype=torch.float64))


def test_scan_agrees_with_a_loop_across_blocks(monkeypatch):
    monkeypatch.setattr("offline_lm.losses.returns._BLOCK", 7)
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(100, generator=generator, dtype=torch.float64)
    b = torch.randn(100, generator=generator, dtype=torch.float64)
    offsets = offsets_of([1, 0, 13, 7, 50, 29])
    last = torch.arange(6.0, dtype=torch.float64)
    want = loop(a.tolist(), b.tolist(), offsets.tolist(), last.tolist())
    assert_close(reverse_scan(a, b, offsets, last), torch.tensor(want, dtype=torch.float64))


def test_returns_by_hand():
    # Two episodes. First: 1 + .5 (2 + .5 * 4) = 3. Second is truncated and goes on into a state worth 8.
    rewards = torch.tensor([1.0, 2.0, 4.0, 0.0, 1.0])
    continues = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    offsets = torch.tensor([0, 3, 5])
    got = discounted_returns(rewards, continues, offsets, gamma=0.5, bootstrap=torch.tensor([100.0, 8.0]))
    assert got.tolist() == [3.0, 4.0, 4.0, 2.5, 5.0]
    # Without a bootstrap the second ends in its logged outcome.
    assert discounted_returns(rewards, continues, offsets, gamma=0.5).tolist() == [3.0, 4.0, 4.0, 0.5, 1.0]


def test_one_terminal_reward_is_discounted_by_turns_to_go():
    rewards = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    continues = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    got = discounted_returns(rewards, continues, torch.tensor([0, 4]), gamma=0.9)
    assert_close(got, torch.tensor([0.729, 0.81, 0.9, 1.0], dtype=torch.float64))


def test_advantages_by_hand():
    rewards = torch.tensor([1.0, 0.0, 2.0])
    continues = torch.tensor([1.0, 1.0, 0.0])
    values = torch.tensor([4.0, 2.0, 1.0])
    after = torch.tensor([2.0, 1.0, 7.0])
    offsets = torch.tensor([0, 3])
    # delta: 1 + .5*2 - 4, 0 + .5*1 - 2, 2 - 1
    assert td_residuals(rewards, continues, values, after, gamma=0.5).tolist() == [-2.0, -1.5, 1.0]
    # A_2 = 1, A_1 = -1.5 + .25, A_0 = -2 + .25 * -1.25
    got = gae(rewards, continues, values, after, offsets, gamma=0.5, lam=0.5)
    assert got.tolist() == [-2.3125, -1.25, 1.0]
    # G_2 = 2, G_1 = .5 (.5*1 + .5*2), G_0 = 1 + .5 (.5*2 + .5*.75)
    assert lambda_returns(rewards, continues, after, offsets, gamma=0.5, lam=0.5).tolist() == [
        1.6875,
        0.75,
        2.0,
    ]


@settings(deadline=None)
@given(ragged(), st.floats(0, 1), st.floats(0, 1))
def test_lambda_return_is_gae_plus_value_and_its_ends_are_td_and_monte_carlo(data, gamma, lam):
    offsets, rewards, continues, _, _, last = data
    values = data[3]
    after = next_values(values, offsets, final_values=last)
    got = lambda_returns(rewards, continues, after, offsets, gamma=gamma, lam=lam)
    assert_close(got, values + gae(rewards, continues, values, after, offsets, gamma=gamma, lam=lam))
    one_step = lambda_returns(rewards, continues, after, offsets, gamma=gamma, lam=0.0)
    assert_close(one_step, rewards + gamma * continues * after)
    monte_carlo = lambda_returns(rewards, continues, after, offsets, gamma=gamma, lam=1.0)
    assert_close(monte_carlo, discounted_returns(rewards, continues, offsets, gamma=gamma, bootstrap=last))


@settings(deadline=None)
@given(ragged(), st.floats(0, 1))
def test_the_ends_of_gae_are_closed_forms_and_episodes_keep_apart(data, gamma):
    """lambda = 0: the TD residual. lambda = 1: the return, bootstrapped where the episode was cut, less V."""
    offsets, rewards, continues, values, _, last = data
    after = next_values(values, offsets, final_values=last)
    given_all = (rewards, continues, values, after)
    residual = rewards + gamma * continues * after - values
    assert_close(gae(*given_all, offsets, gamma=gamma, lam=0.0), residual)
    want = loop((gamma * continues).tolist(), rewards.tolist(), offsets.tolist(), last.tolist())
    monte_carlo = torch.tensor(want, dtype=torch.float64)
    assert_close(gae(*given_all, offsets, gamma=gamma, lam=1.0), monte_carlo - values)
    # Each episode alone gives what it gives among the others.
    together = gae(*given_all, offsets, gamma=gamma, lam=0.7)
    for first, end in itertools.pairwise(offsets.tolist()):
        r, c, v, following = (x[first:end] for x in given_all)
        alone = gae(r, c, v, following, torch.tensor([0, end - first]), gamma=gamma, lam=0.7)
        assert_close(alone, together[first:end])


def test_gae_of_a_cut_episode_bootstraps_from_the_row_of_its_final_observation():
    """gamma 1/2, lambda 1/2. Ended: deltas -1, 1. Cut, then a state worth 8: deltas 0, 2."""
    values, offsets = torch.tensor([1.0, 0.0, 1.0, 2.0]), torch.tensor([0, 2, 4])
    rewards, continues = torch.tensor([0.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    after = next_values(values, offsets, final_values=torch.tensor([NAN, 8.0]))
    advantage = gae(rewards, continues, values, after, offsets, gamma=0.5, lam=0.5)
    assert advantage.tolist() == [-1 + 1 / 4, 1.0, 0 + 2 / 4, 2.0]
    # Trap 3: the cut taken for an end.
    ended = gae(rewards, torch.tensor([1.0, 0.0, 1.0, 0.0]), values, after, offsets, gamma=0.5, lam=0.5)
    assert ended[2:].tolist() == [0 - 2 / 4, -2.0]


def test_gae_before_a_cut_with_nothing_logged_after_it():
    """The masked last step, given as r = V and continue = 0, hands nothing on to the steps before it."""
    values, offsets = torch.tensor([1.0, 3.0, 2.0]), torch.tensor([0, 3])
    rewards, continues = torch.zeros(3), torch.ones(3)
    known = bootstrap_mask(continues, offsets)
    assert known.tolist() == [True, True, False]
    after = next_values(values, offsets)
    rewards, continues = rewards.where(known, values), continues.where(known, 0.0)
    advantage = gae(rewards, continues, values, after, offsets, gamma=0.5, lam=0.5)
    assert advantage.tolist() == [0.5 - 2 / 4, -2.0, 0.0]
    assert gae(torch.zeros(3), torch.ones(3), values, after, offsets, gamma=0.5, lam=0.5)[1].item() == -2.5


def test_trap_13_the_discount_counts_turns_and_a_turn_needs_no_reward():
    """Three turns of 2, 1 and 3 tokens with 5 tokens of observation before each; the reward comes last."""
    rewards, continues = [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]
    values, gamma, lam = [0.5, 0.25, 0.5], 0.5, 0.5
    # deltas: -3/8, 0, 1/2
    want = torch.tensor([-3 / 8 + (0 + 1 / 8) / 4, 1 / 8, 1 / 2])

    def turns(rewards, continues, values):
        values, offsets = torch.tensor(values), torch.tensor([0, len(values)])
        given_all = (torch.tensor(rewards), torch.tensor(continues), values, next_values(values, offsets))
        return gae(*given_all, offsets, gamma=gamma, lam=lam)

    assert turns(rewards, continues, values).tolist() == want.tolist()
    lengths = [2, 1, 3]
    owner = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    assert want[owner].shape == (6,), "every token of a turn has the turn's advantage"

    # The bug: every token, of observations too, is a step.
    tokens = [5 + length for length in lengths]
    ends = torch.tensor(tokens).cumsum(0) - 1
    reward_of, continue_of = torch.zeros(sum(tokens)), torch.ones(sum(tokens))
    reward_of[ends], continue_of[ends] = torch.tensor(rewards), torch.tensor(continues)
    value_of = torch.tensor(values).repeat_interleave(torch.tensor(tokens))
    decayed = turns(reward_of.tolist(), continue_of.tolist(), value_of.tolist())
    assert not torch.allclose(decayed[ends], want)
    # The bug: a turn is where a reward is.
    rewarded = [i for i, r in enumerate(rewards) if r]
    found = turns([1.0], [0.0], [values[i] for i in rewarded])
    assert found.shape != want.shape


def test_trap_1_the_last_step_is_never_chained_to_itself():
    values = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0])
    offsets = torch.tensor([0, 3, 5])
    want = [2.0, 3.0, 0.0, 20.0, 0.0]
    assert next_values(values, offsets).tolist() == want
    assert next_values(values, offsets, final_values=torch.tensor([7.0, 8.0])).tolist() == [
        2.0,
        3.0,
        7.0,
        20.0,
        8.0,
    ]
    bug = values[(torch.arange(5) + 1).minimum(torch.tensor([2, 2, 2, 4, 4]))]
    assert bug.tolist() != want
    neighbour = values.roll(-1)
    assert neighbour.tolist() != want


def test_trap_2_a_final_reward_counts_once():
    rewards, continues = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 0.0])
    offsets = torch.tensor([0, 3])

    def holds(rewards):
        return discounted_returns(rewards, continues, offsets, gamma=1.0).tolist() == [1.0, 1.0, 1.0]

    assert holds(rewards)
    assert not holds(torch.full((3,), 1.0)), "the outcome copied to every step"
    assert not holds(torch.tensor([0.0, 0.0, 2.0])), "the outcome added to a last reward that held it"


def test_trap_3_a_time_limit_is_no_termination():
    # Both episodes end in the same way but for the reason: the second was cut while it went on.
    rewards, offsets = torch.zeros(4), torch.tensor([0, 2, 4])
    terminated = torch.tensor([False, True, False, False])
    truncated = torch.tensor([False, False, False, True])
    after = torch.tensor([0.5, 0.9, 0.5, 0.9])

    def target(done):
        return lambda_returns(rewards, 1.0 - done.float(), after, offsets, gamma=1.0, lam=1.0)

    want = torch.tensor([0.0, 0.0, 0.9, 0.9])
    assert_close(target(terminated), want)
    assert not torch.allclose(target(terminated | truncated), want)


def test_a_cut_with_nothing_logged_after_it_has_no_bootstrapped_target():
    continues = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    offsets = torch.tensor([0, 2, 4, 4, 5])
    assert bootstrap_mask(continues, offsets).tolist() == [True, True, True, False, False]
    logged = torch.tensor([False, True, False, False])
    assert bootstrap_mask(continues, offsets, has_final=logged).tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("gamma", [0.9, 0.99, 1.0])
def test_trap_4_long_episodes_in_float32(gamma):
    length = 2_500
    rewards = torch.randn(length, generator=torch.Generator().manual_seed(0))
    continues, offsets = torch.ones(length), torch.tensor([0, length])
    exact = discounted_returns(rewards.double(), continues.double(), offsets, gamma=gamma)
    assert_close(exact.tolist(), loop([gamma] * length, rewards.double().tolist(), [0, length], [0.0]))

    def holds(returns):
        return bool(((returns - exact).abs() <= 1e-4 * exact.abs().max()).all())

    assert holds(discounted_returns(rewards, continues, offsets, gamma=gamma))
    if gamma == 0.9:
        powers = torch.full((length,), gamma).cumprod(0)
        by_division = (rewards * powers).flip(0).cumsum(0).flip(0) / powers
        assert by_division.isnan().any()
        assert not holds(by_division)


def test_float64_stays_and_less_becomes_float32():
    ones, offsets = torch.ones(3), torch.tensor([0, 3])
    for given_dtype, dtype in [
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.int64, torch.float32),
    ]:
        got = reverse_scan(ones.to(given_dtype), ones.to(given_dtype), offsets)
        assert got.dtype == dtype
        assert got.tolist() == [3.0, 2.0, 1.0]


def test_an_unlogged_reward_stays_in_its_own_episode_and_before_it():
    rewards = torch.tensor([1.0, 1.0, NAN, 1.0, 1.0, 1.0, NAN, 5.0])
    continues = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    got = discounted_returns(rewards, continues, torch.tensor([0, 2, 5, 8]), gamma=0.5)
    assert_close(got, torch.tensor([1.5, 1.0, NAN, 1.5, 1.0, 1.0, NAN, 5.0]), equal_nan=True)
    # What a plain doubling scan does: 0 * NaN leaks over the border of episodes.
    a = 0.5 * continues
    a[[1, 4, 7]] = 0.0
    assert _scan(a, rewards, 3)[1].isnan()


def test_an_unknown_value_after_a_terminal_step_does_not_matter():
    rewards, continues, offsets = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]), torch.tensor([0, 2])
    unknown = torch.tensor([NAN])
    assert discounted_returns(rewards, continues, offsets, gamma=0.5, bootstrap=unknown).tolist() == [
        0.5,
        1.0,
    ]
    after = torch.tensor([0.25, NAN])
    assert lambda_returns(rewards, continues, after, offsets, gamma=0.5, lam=0.0).tolist() == [0.125, 1.0]


def test_targets_carry_no_gradient():
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    ones, offsets = torch.ones(2), torch.tensor([0, 2])
    after = next_values(values, offsets, final_values=values[:1])
    assert after.requires_grad, "the shift itself is differentiable"
    for target in (
        discounted_returns(ones, ones, offsets, gamma=0.9, bootstrap=values[:1]),
        td_residuals(ones, ones, values, after, gamma=0.9),
        gae(ones, ones, values, after, offsets, gamma=0.9, lam=0.9),
        lambda_returns(ones, ones, after, offsets, gamma=0.9, lam=0.9),
    ):
        assert not target.requires_grad


def test_inputs_are_left_as_they_were():
    a, b = torch.full((3,), 0.5), torch.ones(3)
    reverse_scan(a, b, torch.tensor([0, 3]), torch.ones(1))
    assert a.tolist() == [0.5] * 3
    assert b.tolist() == [1.0] * 3


def test_nothing_gives_nothing():
    assert reverse_scan(torch.ones(0), torch.ones(0), torch.tensor([0, 0])).shape == (0,)


@pytest.mark.parametrize("offsets", [[0, 2], [1, 3], [0, 2, 1, 3], [], [[0, 3]]])
def test_offsets_that_do_not_fit_are_refused(offsets):
    with pytest.raises(ValueError, match="offsets must rise from 0 to the number of steps, 3"):
        reverse_scan(torch.ones(3), torch.ones(3), torch.tensor(offsets))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="shape"):
        reverse_scan(torch.ones(1), torch.ones(3), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="one last value an episode: 1 episodes"):
        reverse_scan(torch.ones(3), torch.ones(3), torch.tensor([0, 3]), torch.ones(3))


def test_n_step_returns_by_hand():
    rewards, continues = torch.tensor([1.0, 2, 3, 4, 5]), torch.tensor([1.0, 1, 0, 1, 1])
    following, offsets = torch.tensor([10.0, 20, NAN, 40, 50]), torch.tensor([0, 3, 3, 5])
    got = n_step_returns(rewards, continues, following, offsets, gamma=0.5, steps=2)
    assert got.tolist() == [1 + 0.5 * (2 + 0.5 * 20), 2 + 0.5 * 3, 3, 4 + 0.5 * (5 + 0.5 * 50), 5 + 0.5 * 50]
    with pytest.raises(ValueError, match="at least 1"):
        n_step_returns(rewards, continues, following, offsets, gamma=0.5, steps=0)


@settings(deadline=None)
@given(ragged(), st.floats(0, 1), st.integers(1, 50))
def test_n_step_returns_agree_with_a_loop(data, gamma, steps):
    offsets, rewards, continues, _, following, _ = data
    want = []
    for first, end in itertools.pairwise(offsets.tolist()):
        for t in range(first, end):
            last = min(t + steps, end) - 1
            total, share = 0.0, 1.0
            for i in range(t, last + 1):
                total += share * rewards[i].item()
                share *= gamma * continues[i].item()
            want.append(total + share * following[last].item())
    got = n_step_returns(rewards, continues, following, offsets, gamma=gamma, steps=steps)
    assert got.tolist() == pytest.approx(want)


@pytest.mark.filterwarnings("error")
def test_corners_of_the_scan():
    one, two = torch.tensor([0, 1]), torch.tensor([0, 2])
    assert reverse_scan(torch.tensor([0.5]), torch.tensor([1.0]), one, torch.tensor([4.0])).tolist() == [3.0]
    mixed = reverse_scan(torch.tensor([0.5] * 2), torch.ones(2), two, torch.tensor([4.0], dtype=torch.float64))
    assert (mixed.dtype, mixed.tolist()) == (torch.float32, [2.5, 3.0])
    nothing = torch.zeros(0, dtype=torch.int64)
    assert reverse_scan(nothing, nothing, torch.tensor([0])).dtype == torch.float32
    # An unknown factor, too, stays in its own episode.
    got = reverse_scan(torch.tensor([0.5, 0.5, 0.5, NAN, 0.5, 0.5]), torch.ones(6), torch.tensor([0, 3, 6]))
    assert_close(got, torch.tensor([1.75, 1.5, 1.0, NAN, 1.5, 1.0]), equal_nan=True)


def test_final_values_of_another_type():
    final = torch.tensor([7.0], dtype=torch.float64)
    after = next_values(torch.tensor([1.0, 2.0]), torch.tensor([0, 2]), final_values=final)
    assert (after.dtype, after.tolist()) == (torch.float32, [2.0, 7.0])


def test_n_step_returns_of_episodes_of_one_step():
    rewards, following = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])
    got = n_step_returns(rewards, torch.ones(2), following, torch.tensor([0, 1, 2]), gamma=0.5, steps=2)
    assert got.tolist() == [6.0, 12.0]

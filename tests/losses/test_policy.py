"""Log-probabilities of responses (trap 16: a sum where a mean is meant, or the reverse)."""

import pytest
import torch

from offline_lm.losses.policy import sequence_logprob

LOGPROBS = torch.tensor([[-1.0, -2.0, float("nan")], [-3.0, -5.0, -1.0], [0.0, 0.0, 0.0]])
MASK = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])


def test_sum_and_mean_by_hand():
    total = sequence_logprob(LOGPROBS, MASK, reduce="sum").tolist()
    mean = sequence_logprob(LOGPROBS, MASK, reduce="mean").tolist()
    assert total == [-3.0, -9.0, 0.0]
    assert mean == [-1.5, -3.0, 0.0]
    assert total != mean, "trap 16: one in place of the other fails above"


def test_the_mean_counts_tokens_of_the_response_not_columns():
    bug = LOGPROBS.nan_to_num().mul(MASK).mean(dim=-1)
    assert bug[0].item() == -1.0
    assert sequence_logprob(LOGPROBS, MASK, reduce="mean")[0].item() == -1.5


def test_reduce_must_be_said():
    with pytest.raises(TypeError, match="reduce"):
        sequence_logprob(LOGPROBS, MASK)  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValueError, match="'sum' or 'mean', not 'total'"):
        sequence_logprob(LOGPROBS, MASK, reduce="total")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="mask of shape"):
        sequence_logprob(LOGPROBS, MASK[:2], reduce="sum")


def test_gradcheck_and_no_gradient_outside_the_mask():
    logprobs = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    mask = MASK[:2]
    assert torch.autograd.gradcheck(lambda x: sequence_logprob(x, mask, reduce="mean"), logprobs)
    sequence_logprob(logprobs, mask, reduce="sum").sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]

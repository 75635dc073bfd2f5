"""Token ids and log-probabilities of a rollout, as verifiers, TRL and their like log them, to the steps of an episode.

They are either one record for each decision (``trajectory[].tokens``) or one for the whole rollout. In both,
``completion_mask`` is 1 for what the model wrote and 0 for what came from the environment; of a whole rollout each run
of ones is the response of one decision, and everything before it its prompt.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

from offline_lm.logs._adapters import need, take
from offline_lm.logs._records import Bad

Steps = list[dict[str, Any]]


def of_trajectory(trajectory: list[Any], steps: Steps) -> bool:
    """Writes the tokens of each decision to its step; False, and nothing written, if the counts differ."""
    if len(trajectory) != len(steps):
        return False
    for i, (item, step) in enumerate(zip(trajectory, steps, strict=True)):
        tokens = take(item, "tokens", dict, f"trajectory[{i}]")
        if tokens is not None:
            prompt, spans = _spans(tokens, f"trajectory[{i}].tokens")
            ids = [token for _, part, _ in spans for token in part]
            logprobs = [value for _, _, part in spans for value in part or ()] if spans and spans[0][2] else None
            _put(step, prompt, ids, logprobs)
            if (tokenizer := take(tokens, "tokenizer_id", str, f"trajectory[{i}].tokens")) is not None:
                step["tokenizer_id"] = tokenizer
    return True


def of_rollout(tokens: dict[str, Any], steps: Steps, place: str) -> bool:
    """Writes the tokens of a whole rollout; False, and nothing written, if it has not one response for each step."""
    prompt, spans = _spans(tokens, place)
    if len(spans) != len(steps):
        return False
    for (before, ids, logprobs), step in zip(spans, steps, strict=True):
        _put(step, None if prompt is None else prompt + before, ids, logprobs)
    return True


def _put(step: dict[str, Any], prompt: list[int] | None, ids: list[int], logprobs: list[float] | None) -> None:
    step["response_token_ids"] = tuple(ids)
    if prompt is not None:
        step["prompt_token_ids"] = tuple(prompt)
    if logprobs is not None:
        step["response_logprobs"] = tuple(logprobs)


def _spans(tokens: dict[str, Any], place: str) -> tuple[list[int] | None, list[tuple[list[int], list[int], Any]]]:
    """(ids of the prompt, [(completion ids before it, ids, log-probabilities) of each run that the model wrote])."""
    prompt = take(tokens, "prompt_ids", list, place)
    ids = need(tokens, "completion_ids", list, place)
    logprobs = take(tokens, "completion_logprobs", list, place)
    mask = take(tokens, "completion_mask", list, place)
    for name, other in (("completion_logprobs", logprobs), ("completion_mask", mask)):
        if other is not None and len(other) != len(ids):
            raise Bad("length_mismatch", f"{place} has {len(ids)} completion_ids and {len(other)} {name}; log one each")
    for name, given in (("prompt_ids", prompt), ("completion_ids", ids)):
        for i, token in enumerate(given or ()):
            if type(token) is not int or not 0 <= token < 2**31:
                raise Bad("bad_value", f"{place}.{name}[{i}] is no token id; log the tokenizer's own ids")
    for i, value in enumerate(logprobs or ()):
        if type(value) not in (int, float) or value > 1e-6:
            message = f"{place}.completion_logprobs[{i}] is not the logarithm of a probability, a number of at most 0"
            raise Bad("bad_value", message)
    spans = []
    for written, run in groupby(range(len(ids)), key=lambda i: mask is None or mask[i] in (1, True)):
        if written:
            at = list(run)
            a, b = at[0], at[-1] + 1
            spans.append((ids[:a], ids[a:b], None if logprobs is None else [float(v) for v in logprobs[a:b]]))
    return prompt, spans

"""What Harbor leaves beside a trajectory: the verifier's reward and the trial's ``result.json``. See `atif`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from offline_lm.logs._adapters import contents
from offline_lm.logs._files import whole
from offline_lm.logs._records import Bad, parse
from offline_lm.types import JSON


def load(file: Path) -> tuple[Any, bytes]:
    data = contents(file)
    if not data.strip():
        raise Bad("empty_file", f"{file.name} is empty; was it written to the end?")
    return parse(data), data


class Outcome:
    """What a trial's folder says beside the trajectory."""

    def __init__(self) -> None:
        self.reward: float | None = None
        self.rewards: dict[str, float] = {}
        self.flags: list[str] = []
        self.result: JSON = {}
        self.exception: str | None = None
        self.extra: JSON = {}


def outcome_of(trial: Path) -> Outcome:
    found = Outcome()
    if (trial / "result.json").is_file():
        try:
            found.result = _object(load(trial / "result.json")[0])
        except Bad:
            found.flags.append("result_unreadable")
    logged = found.result.get("verifier_result")
    if type(logged) is dict and type(logged.get("rewards")) is dict:
        found.rewards = {name: float(value) for name, value in logged["rewards"].items() if is_number(value)}
    raised = found.result.get("exception_info")
    if type(raised) is dict:
        found.exception = str(raised.get("exception_type"))
        found.extra["exception"] = {key: raised.get(key) for key in ("exception_type", "exception_message")}
    try:
        filed = _rewards_in(trial / "verifier")
    except Bad as bad:
        found.flags.append("reward_unreadable")
        found.extra["reward_error"] = bad.message
        found.rewards = {}
    else:
        if filed is not None:
            if found.rewards and found.rewards != filed:
                found.flags.append("reward_conflict")
                found.extra["result_rewards"] = found.rewards
            found.rewards = filed
    if "reward" in found.rewards or len(found.rewards) == 1:
        found.reward = found.rewards.get("reward", next(iter(found.rewards.values())))
    elif found.rewards:
        found.flags.append("several_rewards")
    return found


def _rewards_in(verifier: Path) -> dict[str, float] | None:
    """What the verifier wrote; None if it wrote nothing. Raises Bad for a file that holds no number."""
    if (verifier / "reward.txt").is_file():
        data = whole(verifier / "reward.txt", 1000)[0]
        try:
            number = float(data.decode().strip())
        except ValueError:
            raise Bad("bad_value", "reward.txt holds no number; run the verifier again") from None
        if not math.isfinite(number):
            raise Bad("json_number", "the number in reward.txt is not finite; run the verifier again")
        return {"reward": number}
    if (verifier / "reward.json").is_file():
        given = load(verifier / "reward.json")[0]
        given = {"reward": given} if is_number(given) else _object(given)
        rewards = {name: float(value) for name, value in given.items() if is_number(value)}
        if not rewards:
            raise Bad("bad_value", "reward.json holds no number; run the verifier again")
        return rewards
    return None


def is_number(value: Any) -> bool:
    return type(value) is int or type(value) is float


def _object(value: Any) -> JSON:
    if type(value) is not dict:
        raise Bad("not_an_object", "not a JSON object")
    return value

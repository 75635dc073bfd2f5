"""LATS searches in WebShop: rollouts, branches and candidates, and the totals of the real logs."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offline_lm.logs import webshop_lats
from offline_lm.logs._adapters import Sample
from offline_lm.store import rows
from offline_lm.types import Episode, Rejected

EXAMPLES = "Webshop \nInstruction:  \nan example \n[Search] \n\nAction: search[example]\nObservation: \n[Buy Now] \n"
QUESTION = "\nWebShop \nInstruction:  \na red mug \n[Search] "


class Log:
    """Writes what LATS logs: each line stamped, messages of several lines as they are."""

    def __init__(self):
        self.text = ""

    def add(self, message: str) -> "Log":
        self.text += f"2023-10-10 01:48:25,478 - INFO - {message}\n"
        return self

    def prompt(self, *done: tuple[str, str]) -> "Log":
        past = "".join(f"\n\nAction: {action}\nObservation: {page}" for action, page in done)
        return self.add(f"PROMPT: {EXAMPLES}\n{QUESTION}{past}\nAction: \n")

    def tried(self, depth: int, action: str, page: str, reward: float | None = None, value="0.00") -> "Log":
        self.add("{'fixed_4': {'session': 'fixed_4', 'page_type': 'init'}}")
        if reward is not None:
            self.add(f"reward:{reward}")
        return self.add(f"NEW NODE: Node(depth={depth}, value={value}, visits=0, action={action}, observation={page})")


def search() -> Log:
    """Two searches tried at the root, one of them twice; below the better one, Buy Now twice and an invalid action."""
    log = Log().add("{}").add("Iteration 1...").prompt()
    log.add(r"SAMPLED ACTION: ['\nAction: search[mug]', '\nAction: search[red mug]\n', '\nAction: search[mug]']")
    log.tried(1, "search[mug]", "\n[Blue] ").tried(1, "search[red mug]", "\n[Red] ").tried(
        1, "search[mug]", "\n[Blue] "
    )
    log.add("VALUE OUTPUTS: ['fair']").add("VALUES: 0.4").add("VALUES: 0.9")
    log.add("Length of votes: 2").prompt(("search[red mug]", "\n[Red] "))
    log.add(r"SAMPLED ACTION: ['\nAction: click[Buy Now]', '\nAction: I will buy it', '\nAction: click[Buy Now]']")
    log.tried(2, "click[Buy Now]", "Your score (min 0.0, max 1.0): 1.0", reward=1.0, value="1.00")
    log.tried(2, "I will buy it", "Invalid action!", value="-1.00")
    return log.tried(2, "click[Buy Now]", "Your score (min 0.0, max 1.0): 0.5", reward=0.5, value="0.50")


def read(folder, text: str | bytes) -> list[Any]:
    path = folder / "run.log"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return list(webshop_lats.read(path))


def test_each_end_is_a_rollout_and_the_later_branch_off_the_first(tmp_path):
    first, second = read(tmp_path, search().text)
    assert (first.native_id, first.parent_episode_id, first.branch_step) == ("0", None, None)
    assert (second.native_id, second.branch_step) == ("0/1", 1)
    assert second.parent_episode_id == rows.convert(first, "i").episode_id
    assert (
        [s.action for s in first.steps]
        == [s.action for s in second.steps]
        == ["search[red mug]", "click[Buy Now]", None]
    )
    assert [s.reward for s in first.steps] == [0, 1, None]
    assert [s.reward for s in second.steps] == [0, 0.5, None]
    assert (first.success, second.success, first.policy_kind) == (True, False, "search")
    assert (first.goal, first.task_id) == ("a red mug", "webshop/fixed_4")
    assert first.steps[2].observation == "Your score (min 0.0, max 1.0): 1.0"
    assert first.steps[1].terminated is True
    assert first.terminated is True
    assert first.truncated is False


def test_candidates_are_the_siblings_with_their_values(tmp_path):
    first, second = read(tmp_path, search().text)
    shown = [(c.action, c.score, c.executed, c.response) for c in first.steps[0].candidates]
    assert shown == [
        ("search[mug]", 0.4, False, "\nAction: search[mug]"),
        ("search[red mug]", 0.9, True, "\nAction: search[red mug]\n"),
        ("search[mug]", 0.4, False, "\nAction: search[mug]"),
    ]
    assert {c.source for c in first.steps[0].candidates} == {"search"}
    assert first.steps[0].candidates_complete is False
    assert [c.executed for c in first.steps[1].candidates] == [True, False, False]
    assert [c.executed for c in second.steps[1].candidates] == [False, False, True]
    assert [c.score for c in first.steps[1].candidates] == [None, None, None]  # ended, or not judged
    assert first.steps[0].extra == {"siblings": {"search[mug]": "[Blue] "}}
    assert second.steps[0].extra is None
    assert first.steps[1].extra == {"siblings": {"I will buy it": "Invalid action!"}}


def test_a_value_that_could_not_be_read_is_null(tmp_path):
    first, _ = read(tmp_path, search().text.replace("VALUES: 0.4", "VALUES: -1"))
    assert [c.score for c in first.steps[0].candidates] == [None, 0.9, None]


def test_an_invalid_action_earns_nothing(tmp_path):
    log = Log().add("Iteration 1...").prompt().add(r"SAMPLED ACTION: ['\nAction: buy']")
    (episode,) = read(tmp_path, log.tried(1, "buy", "Invalid action!", value="-1.00").text)
    step = episode.steps[0]
    assert (step.action, step.action_name, step.action_valid, step.reward) == ("buy", None, False, None)
    assert episode.quality_flags == ("unlabelled",)
    assert episode.success is None
    assert episode.terminated is None


def test_a_later_iteration_continues_the_tree(tmp_path):
    log = (
        search().add("Iteration 2...").add("Selecting from 2 children at depth 0.").prompt(("search[mug]", "\n[Blue] "))
    )
    log.add(r"SAMPLED ACTION: ['\nAction: click[Buy Now]']")
    log.tried(2, "click[Buy Now]", "Your score (min 0.0, max 1.0): 0.1", reward=0.1, value="0.10")
    third = read(tmp_path, log.text)[2]
    assert (third.native_id, third.branch_step, third.extra) == ("0/2", 0, {"iterations": 2})
    assert [c.executed for c in third.steps[0].candidates] == [False, False, True]  # of equal actions the last


def test_searches_are_apart_and_one_without_nodes_is_refused(tmp_path):
    found = read(tmp_path, search().text + Log().add("Iteration 1...").prompt().text + search().text)
    assert [getattr(item, "native_id", None) or item.reason for item in found] == ["0", "0/1", "no_steps", "2", "2/1"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "unknown_format"),
        (b"Iteration 1...", "unknown_format"),
        (search().text.encode().replace(b"[Blue]", b"\xff"), "invalid_utf8"),
        (Log().add("Iteration 1...").tried(1, "search[a]", "x").text.encode(), "bad_value"),
        (search().prompt(("search[cup]", "?")).text.encode(), "bad_value"),
        (search().text.encode().replace(b"visits=0", b""), "bad_value"),
    ],
)
def test_refused(tmp_path, text, reason):
    assert [item.reason for item in read(tmp_path, text)] == [reason]


def test_responses_that_cannot_be_read_are_null(tmp_path):
    first, _ = read(tmp_path, search().text.replace("SAMPLED ACTION: [", "SAMPLED ACTION: [__import__('os'), "))
    assert first.steps[0].response is None
    assert first.steps[0].action == "search[red mug]"


def test_detect(tmp_path):
    (tmp_path / "a.log").write_text(search().text)
    (tmp_path / "b.log").write_text("2023-10-10 01:48:25,478 - INFO - Iteration 1...\n")
    assert webshop_lats.detect(Sample(tmp_path / "a.log"))
    assert webshop_lats.detect(Sample(tmp_path / "b.log")) is None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, len(search().text)), length=st.integers(0, 60), junk=st.binary(max_size=12))
def test_damaged_bytes(tmp_path, at, length, junk):
    data = search().text.encode()
    for item in read(tmp_path, data[:at] + junk + data[at + length :]):
        assert isinstance(item, Rejected) or rows.convert(item, "i").n_steps


def test_real_logs(shared_data):
    """6 iterations: 3 searches that came to an end, 5 rollouts each, and 3 that were stopped before any node.

    PROVENANCE counts 90 nodes as steps: they are the candidates of the first rollouts. The 15 rollouts repeat the
    4 steps that they share, so they hold 75. One of the three trees has another goal than "one goal" says.
    """
    found = list(webshop_lats.read(shared_data / "lats-webshop"))
    whole = [item for item in found if isinstance(item, Episode)]
    assert [item.reason for item in found if isinstance(item, Rejected)] == ["no_steps"] * 3
    assert len(whole) == sum(e.success is True for e in whole) == 15
    stored = [rows.convert(episode, "i") for episode in whole]
    assert sum(row.n_steps for row in stored) == 75
    assert len({row.episode_id for row in stored}) == 15
    first = [e for e in whole if e.parent_episode_id is None]
    assert len(first) == 3
    assert sum(len(s.candidates or ()) for e in first for s in e.steps) == 90
    assert {e.branch_step for e in whole if e.parent_episode_id} == {4}
    assert len({e.goal for e in first}) == 2
    assert {e.parent_episode_id for e in whole} - {None} == {rows.convert(e, "i").episode_id for e in first}
    responses = [step.response for e in whole for step in e.steps if not step.is_final_observation]
    assert all(response and response.startswith("\nAction: ") for response in responses)
    depth1 = next(e for e in first if e.dataset == "new_run").steps[0].candidates or ()
    assert [c.score for c in depth1] == [0.2, 0.4, 0.4, 0.4, 0.1, 0.2, 0.4, 0.4, 0.4, 0.3]

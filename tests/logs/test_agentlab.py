"""Result folders of AgentLab: outcomes moved to the action that earned them, ends and crashes, and the real runs.

The folders are written with classes of the names that BrowserGym has, pickled as its ``loop.py`` does.
"""

import gzip
import json
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offline_lm import logs
from offline_lm.errors import UserError
from offline_lm.logs._adapters import Sample
from offline_lm.logs._browsergym import parsed
from offline_lm.logs.agentlab import detect
from offline_lm.store.rows import convert
from offline_lm.types import Episode, Rejected

NAME = "2025-01-22_11-03-29_Agent-x_on_miniwob.click-test_7"
TREE = "RootWebArea 'Test'\n\t[17] button 'One', clickable\n\t[18] checkbox 'Two', checked='false'"


@pytest.fixture(autouse=True)
def browsergym(monkeypatch):
    """Modules that exist only while a test writes its pickles."""
    for package in ("browsergym", "browsergym.experiments", "agentlab", "agentlab.llm"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    for module, names in {
        "browsergym.experiments.loop": ["StepInfo", "StepTimestamps", "ExpArgs", "EnvArgs"],
        "browsergym.experiments.agent": ["AgentInfo"],
        "agentlab.llm.llm_utils": ["Discussion"],
    }.items():
        made = types.ModuleType(module)
        monkeypatch.setitem(sys.modules, module, made)
        for name in names:
            setattr(made, name, type(name, (), {"__module__": module}))
    made = sys.modules["agentlab.llm.llm_utils"]
    made.BaseMessage = type("BaseMessage", (dict,), {"__module__": "agentlab.llm.llm_utils"})  # type: ignore[attr-defined]


def new(module, name, **attributes):
    value = getattr(sys.modules[module], name)()
    value.__dict__.update(attributes)
    return value


def messages(*turns):
    base = sys.modules["agentlab.llm.llm_utils"].BaseMessage  # type: ignore[attr-defined]
    return new("agentlab.llm.llm_utils", "Discussion", messages=[base(role=role, content=text) for role, text in turns])


def agent(reply="<action>go</action>", think="Because.", **keys):
    turns = messages(("system", "You are"), ("user", [{"type": "text", "text": "Page"}]), ("assistant", reply))
    return new("browsergym.experiments.agent", "AgentInfo", think=think, chat_messages=turns, **keys)


def step(number, action: str | None = "click('18')", **keys):
    """A StepInfo before the end: asked, and answered."""
    obs = {
        "goal_object": None, "goal": "legacy", "url": "http://x/",
        "axtree_txt": TREE, "pruned_html": "<b>", "dom_txt": "<c>", "dom_object": {"big": [1] * 50},
        "open_pages_titles": ("a", "b"), "active_page_index": np.asarray([1]),
        "last_action_error": "", "elapsed_time": np.asarray([0.5]), "focused_element_bid": "17",
    }  # fmt: skip
    times = new("browsergym.experiments.loop", "StepTimestamps", env_start=100.0 + number, env_stop=100.5 + number,
                agent_start=100.6 + number, agent_stop=100.9 + number)  # fmt: skip
    fields = {
        "step": number, "obs": obs | keys.pop("obs", {}), "reward": 0, "raw_reward": None, "terminated": False,
        "truncated": False, "action": action, "agent_info": agent(), "stats": {"input_tokens": 10, "cost": 0.5},
        "profiling": times, "task_info": None,
    } | keys  # fmt: skip
    return fields


def last(number, **keys):
    """A StepInfo after the end: no one was asked."""
    return step(number, action=None, agent_info={}, stats=None, **keys)


def write(path: Path, steps, name=NAME, summary: Any = (), exp_args=True):
    folder = path / "study" / name
    folder.mkdir(parents=True, exist_ok=True)
    if exp_args:
        model = {"model_name": "gpt-x", "temperature": 0.1, "max_new_tokens": 64}
        args = new(
            "browsergym.experiments.loop",
            "ExpArgs",
            agent_args={"agent_name": "Agent-x", "chat_model_args": model},
            env_args=new(
                "browsergym.experiments.loop", "EnvArgs", task_name="miniwob.click-test", task_seed=7, max_steps=5
            ),
            exp_dir=path,
            save_screenshot=True,
        )
        (folder / "exp_args.pkl").write_bytes(pickle.dumps(args))
    goal = ({"type": "text", "text": "Tick Two"}, {"type": "image_url", "image_url": {"url": "http://x/i.png"}})
    (folder / "goal_object.pkl.gz").write_bytes(gzip.compress(pickle.dumps(goal)))
    for i, fields in enumerate(steps):
        info = new("browsergym.experiments.loop", "StepInfo", **fields)
        (folder / f"step_{i}.pkl.gz").write_bytes(gzip.compress(pickle.dumps(info)))
    if summary is not None:
        total = {"n_steps": len(steps) - 1, "cum_reward": sum(s["reward"] for s in steps), "err_msg": None}
        (folder / "summary_info.json").write_text(json.dumps(total | dict(summary)))
    return folder


def read(path, **options) -> Any:
    (result,) = logs.read("agentlab", path, **({"allow_pickle": True} | options))
    return result


def test_an_outcome_goes_to_the_action_that_earned_it(tmp_path):
    error = {"last_action_error": "TimeoutError: 500ms"}
    folder = write(
        tmp_path,
        [step(0), step(1, "click('17')\nnoop(100)", reward=0.25, obs=error), last(2, reward=0.75, terminated=True)],
        summary={"stats.cum_input_tokens": 20, "stats.cum_output_tokens": 4.0, "stats.cum_cost": 1.5},
    )
    (folder / "screenshot_step_0.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    got = read(tmp_path)
    first, second, final = got.steps
    assert [(s.reward, s.terminated, s.truncated) for s in got.steps] == [
        (0.25, False, False),
        (0.75, True, False),
        (None, None, None),
    ]
    assert (first.action_error, first.action_valid) == ("TimeoutError: 500ms", False)
    assert (second.action_error, second.action_valid) == (None, True)
    assert (final.is_final_observation, final.action, final.observation) == (True, None, TREE)
    assert (got.outcome_reward, got.success, got.terminated, got.truncated) == (1.0, True, True, False)
    assert (got.end_reason, got.quality_flags) == ("env_done", ())
    assert (got.tokens_in, got.tokens_out, got.cost_usd, got.duration_s) == (20, 4, 1.5, 2.9)
    # the task and the agent
    assert (got.native_id, got.dataset, got.seed) == (NAME, "study", 7)
    assert (got.benchmark, got.task_id, got.task_family) == ("miniwob", "miniwob.click-test", "click-test")
    assert (got.agent, got.model, got.sampling) == ("Agent-x", "gpt-x", {"temperature": 0.1, "max_tokens": 64})
    assert got.goal == "Tick Two\n[image missing]"
    # the page and the action
    assert (first.observation, first.observation_kind, first.title, first.url) == (TREE, "axtree", "b", "http://x/")
    assert (first.action, first.action_name, first.action_args) == ("click('18')", "click", {"bid": "18"})
    assert first.target == {"ref": "18", "role": "checkbox", "text": "Two"}
    assert (first.response, first.thought, first.messages) == ("<action>go</action>", "Because.", None)
    assert second.sub_actions == ("click('17')", "noop(100)")
    assert (first.screenshot["status"], second.screenshot["status"]) == ("ok", "missing")
    assert first.extra["focused_element_bid"] == "17"
    assert "dom_object" not in first.extra
    assert got.extra["exp_args"]["class"] == "browsergym.experiments.loop.ExpArgs"


def test_the_step_limit_is_truncation(tmp_path):
    write(tmp_path, [step(0), last(1, truncated=True)])
    got = read(tmp_path)
    assert (got.terminated, got.truncated, got.end_reason, got.success) == (False, True, "step_limit", False)
    assert (got.steps[0].reward, got.steps[0].truncated, len(got.steps)) == (0.0, True, 2)


@pytest.mark.parametrize(("stats", "reason"), [({"busted_retry": 1}, "agent_error"), ({"cost": 1}, "agent_stop")])
def test_an_agent_that_gives_no_action_ends_the_episode(tmp_path, stats, reason):
    write(tmp_path, [step(0), step(1, None, truncated=True, stats=stats)])
    got = read(tmp_path)
    first, second = got.steps
    assert (first.reward, first.terminated, first.truncated) == (0.0, False, False)
    assert (second.action, second.response, second.action_valid) == (None, "<action>go</action>", False)
    assert (second.reward, second.terminated, second.truncated, second.is_final_observation) == (
        0.0,
        False,
        True,
        False,
    )
    assert (got.truncated, got.end_reason, got.success) == (True, reason, False)
    convert(got, "i")


def test_an_agent_without_a_reply_is_not_lost(tmp_path):
    write(tmp_path, [step(0, None, truncated=True, agent_info={"think": "Hm."})])
    got = read(tmp_path)
    assert (got.steps[0].action, got.steps[0].response, got.steps[0].action_valid) == ("", None, False)
    convert(got, "i")


def test_a_crash_of_the_environment(tmp_path):
    write(tmp_path, [step(0), step(1), last(2) | {"obs": None, "terminated": None, "truncated": None}],
          summary={"err_msg": "Boom", "terminated": None, "truncated": None})  # fmt: skip
    got = read(tmp_path)
    assert [(s.reward, s.terminated, s.truncated) for s in got.steps] == [(0.0, False, False), (None, None, None)]
    assert (got.end_reason, got.terminated, got.truncated) == ("env_error", None, None)
    assert (got.success, got.outcome_reward, got.steps[1].action_error) == (None, None, "Boom")
    convert(got, "i")


def test_a_crash_of_the_agent(tmp_path):
    write(tmp_path, [step(0), last(1, reward=0.5)], summary={"err_msg": "Boom", "stack_trace": "at"})
    got = read(tmp_path)
    assert (got.end_reason, got.terminated, got.truncated, got.success) == ("agent_error", False, False, None)
    assert (got.steps[0].reward, got.steps[1].is_final_observation) == (0.5, True)


def test_a_killed_run_has_no_summary(tmp_path):
    write(tmp_path, [step(0), step(1)], summary=None)
    got = read(tmp_path)
    assert (got.end_reason, got.terminated, got.success, got.quality_flags) == ("unknown", None, None, ("unfinished",))
    assert [s.reward for s in got.steps] == [0.0, None]
    assert (got.tokens_in, got.cost_usd) == (20, 1.0)


def test_a_run_that_was_repeated_and_one_without_exp_args(tmp_path):
    write(tmp_path, [step(0), last(1, terminated=True)], "_" + NAME, exp_args=False)
    got = read(tmp_path)
    assert got.quality_flags == ("superseded",)
    assert (got.agent, got.task_id, got.seed, got.model) == ("Agent-x", "miniwob.click-test", 7, None)
    assert got.steps[0].screenshot is None


def test_views_prompts_and_retries(tmp_path):
    tries = messages(("user", "Page"), ("assistant", "??"), ("user", "Again"), ("assistant", "ok"))
    write(tmp_path, [step(0, agent_info={"chat_messages": tries}), last(1, terminated=True, obs={"axtree_txt": None})])
    first, _ = read(tmp_path, observation="dom_txt", messages=True).steps
    assert (first.observation, first.observation_kind) == ("<c>", "dom")
    assert (first.response, first.extra["retries"]) == ("ok", ["??"])
    assert json.loads(first.messages) == [{"role": "user", "content": "Page"}]
    assert read(tmp_path).steps[1].observation == "<b>"
    with pytest.raises(UserError, match="not a view"):
        read(tmp_path, observation="png")


def test_a_total_that_differs_from_its_rewards(tmp_path):
    write(tmp_path, [step(0), last(1, terminated=True)], summary={"cum_reward": 1.0})
    assert read(tmp_path).quality_flags == ("reward_mismatch",)


def test_pickles_are_refused_unless_allowed(tmp_path):
    write(tmp_path, [step(0), last(1, terminated=True)])
    got = read(tmp_path, allow_pickle=False)
    assert got.reason == "pickle_refused"
    assert "+options.allow_pickle=true" in got.message


def broken(folder, what):
    if what == "no summary, no steps":
        for name in ("step_0.pkl.gz", "step_1.pkl.gz", "summary_info.json"):
            (folder / name).unlink()
    elif what == "no steps":
        (folder / "step_0.pkl.gz").unlink()
        (folder / "step_1.pkl.gz").unlink()
    elif what == "gap":
        (folder / "step_0.pkl.gz").unlink()
    elif what == "tail":
        (folder / "step_1.pkl.gz").unlink()
    elif what == "twice":
        (folder / "step_01.pkl.gz").write_bytes((folder / "step_1.pkl.gz").read_bytes())
    elif what == "mixed":
        (folder / "step_0.pkl.gz").write_bytes((folder / "step_1.pkl.gz").read_bytes())
    elif what == "cut":
        (folder / "step_1.pkl.gz").write_bytes((folder / "step_1.pkl.gz").read_bytes()[:-20])
    elif what == "half":
        data = gzip.decompress((folder / "step_1.pkl.gz").read_bytes())
        (folder / "step_1.pkl.gz").write_bytes(gzip.compress(data[: len(data) // 2]))
    elif what == "evil":
        (folder / "exp_args.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    elif what == "no step":
        (folder / "step_1.pkl.gz").write_bytes(gzip.compress(pickle.dumps({"step": 1})))
    elif what == "summary":
        (folder / "summary_info.json").write_text("[1]")
    elif what == "more":
        (folder / "summary_info.json").write_text('{"n_steps": 0}')


@pytest.mark.parametrize(
    ("what", "reason"),
    {
        "no summary, no steps": "no_steps", "no steps": "outcome_only", "gap": "missing_steps", "tail": "missing_steps",
        "twice": "duplicate_step", "mixed": "step_mismatch", "cut": "damaged_file", "half": "pickle_damaged",
        "evil": "pickle_refused", "no step": "wrong_type", "summary": "not_an_object", "more": "length_mismatch",
    }.items(),
)  # fmt: skip
def test_what_is_rejected(tmp_path, what, reason):
    broken(write(tmp_path, [step(0), last(1, terminated=True)]), what)
    got = read(tmp_path)
    assert (got.reason, bool(got.message)) == (reason, True)


def test_steps_that_cannot_follow_each_other(tmp_path):
    write(tmp_path, [step(0), step(1, terminated=True), last(2)])
    assert read(tmp_path).reason == "steps_after_end"
    write(tmp_path, [step(0), last(1), last(2, terminated=True)])
    assert read(tmp_path).reason == "missing_key"
    write(tmp_path / "reset", [last(0) | {"obs": None}], summary={"err_msg": "Boom"})
    assert read(tmp_path / "reset").reason == "no_steps"


def test_folders_are_recognised(tmp_path):
    folder = write(tmp_path, [step(0)])
    assert detect(Sample(folder))
    assert detect(Sample(tmp_path)) is None
    (tmp_path / "study" / "study.pkl.gz").write_bytes(b"")
    assert detect(Sample(tmp_path / "study"))
    with pytest.raises(UserError, match="holds no folder"):
        list(logs.read("agentlab", _empty(tmp_path)))


def _empty(path: Path) -> Path:
    (path / "empty").mkdir()
    return path / "empty"


@pytest.mark.parametrize(
    ("action", "name", "args"),
    [
        ("fill('a12', 'x', True)", "fill", {"bid": "a12", "value": "x", "enable_autocomplete_menu": True}),
        ('click("3", button="right")', "click", {"bid": "3", "button": "right"}),
        ("select_option('4', ['a', 'b'])", "select_option", {"bid": "4", "options": ["a", "b"]}),
        ("scroll(0, -200.5)", "scroll", {"delta_x": 0, "delta_y": -200.5}),
        ("own(1)", "own", {"arg0": 1}),
    ],
)
def test_actions(action, name, args):
    got = parsed(action, "")
    assert (got["action_name"], got["action_args"]) == (name, args)


@pytest.mark.parametrize("action", ["", "x = 1", "click(", "page.click('1')", "click(open('x'))", "f(**{})", "(" * 4000,
                                    "f(" + "9" * 30 + ")", "a\0b", "f(b'x')"])  # fmt: skip
def test_what_is_no_plain_call(action):
    assert parsed(action, "") == {}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_rejected(tmp_path, data):
    folder = write(tmp_path, [step(0), last(1, terminated=True)])
    name = data.draw(st.sampled_from(["step_0.pkl.gz", "step_1.pkl.gz", "exp_args.pkl", "summary_info.json"]))
    good = (folder / name).read_bytes()
    packed = name.endswith(".gz") and data.draw(st.booleans())
    good = gzip.decompress(good) if packed else good
    at = data.draw(st.integers(0, len(good)))
    bad = good[:at] + data.draw(st.binary(max_size=6)) + good[at + data.draw(st.integers(0, 6)) :]
    (folder / name).write_bytes(gzip.compress(bad) if packed else bad)
    assert isinstance(read(tmp_path), Episode | Rejected)


def test_the_real_runs(shared_data):
    """The card: 3 episodes, 4 steps, 2 successes, 1 failure. The failure has a summary and no steps: outcome_only."""
    path = shared_data / "agentlab"
    boxes, dialog, outcome = list(logs.read("auto", path, allow_pickle=True))
    assert isinstance(boxes, Episode)
    assert isinstance(dialog, Episode)
    assert isinstance(outcome, Rejected)
    assert (outcome.reason, "ascending-numbers_64" in outcome.uri) == ("outcome_only", True)
    assert [s.action for s in boxes.steps] == ["click('18')", "click('30')", "click('33')", None]
    assert [s.reward for s in boxes.steps] == [0.0, 0.0, 1.0, None]
    assert [s.terminated for s in boxes.steps] == [False, False, True, None]
    assert [(s.action, s.reward, s.terminated) for s in dialog.steps] == [
        ("click('20')", 1.0, True),
        (None, None, None),
    ]
    assert (boxes.success, dialog.success) == (True, True)
    assert (boxes.tokens_in, boxes.tokens_out, boxes.cost_usd) == (4339, 225, 0.00078585)
    assert (boxes.goal, boxes.seed, boxes.model) == ("Select SQkB, ug and click Submit.", 20, "gpt-4o-mini")
    assert (boxes.dataset, boxes.task_id) == (
        "2025-01-22_11-03-28_genericagent-gpt-4o-mini-on-miniwob",
        "miniwob.click-checkboxes",
    )
    assert (dialog.steps[0].response or "").endswith("<action>\nclick('20')\n</action>")
    assert dialog.steps[0].target == {"ref": "20", "role": "button", "text": "Close"}
    for episode in (boxes, dialog):
        assert {s.screenshot["status"] for s in episode.steps if s.screenshot} == {"missing"}
        convert(episode, "i")
    refused: list[Any] = list(logs.read("agentlab", path))
    assert [r.reason for r in refused] == ["pickle_refused", "pickle_refused", "outcome_only"]

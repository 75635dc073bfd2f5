"""WebArena and VisualWebArena result folders, written here as their renderer and logger write them."""

import base64
import json
import re
import time
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offline_lm import logs
from offline_lm.errors import UserError
from offline_lm.logs._adapters import Sample
from offline_lm.store import rows
from offline_lm.types import Episode, Rejected

PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)
CONFIG = {
    "sites": ["shopping"],
    "task_id": 21,
    "require_login": True,
    "storage_state": "./.auth/shopping_state.json",
    "start_url": "http://shop:7770/6s-wireless.html",
    "intent": "List the reviewers who mention a small ear cup",
    "intent_template_id": 222,
    "eval": {"eval_types": ["string_match"], "reference_answers": {"must_include": ["Joseph Brzezinski"]}},
}
HOME = "http://shop:7770/"
TREE = "[1] RootWebArea 'One Stop Market' focused: True\n\t[12] link 'Reviews (12)'"


class Renderer:
    """The public renderer's doings: a template that is read back up to the first </body> and written again."""

    def __init__(self, config=CONFIG):
        self.html = self.template("<pre>" + "".join(f"{k}: {v}\n" for k, v in config.items()) + "</pre>\n")
        self.said = "None"

    @staticmethod
    def template(body):
        style = "<style>\n        pre {\n            white-space: pre-wrap;\n"
        style += "            word-wrap: break-word;\n        }\n"
        return (
            f"\n<!DOCTYPE html>\n<head>\n    {style}    </style>\n</head>\n"
            f"<html>\n    <body>\n     {body}\n    </body>\n</html>\n"
        )

    def page(self, raw, parsed, said=None, text=TREE, url=HOME, image=None):
        new = f"<h2>New Page</h2>\n<h3 class='url'><a href={url}>URL: {url}</a></h3>\n"
        new += f"<div class='state_obv'><pre>{text}</pre><div>\n"
        if image:
            shown = base64.b64encode(image).decode()
            new += f"<img src='data:image/png;base64,{shown}' style='width:50vw; height:auto;'/>\n"
        new += f"<div class='prev_action' style='background-color:pink'>{self.said}</div>\n"
        action = parsed
        if raw is not None:
            action = f"<div class='raw_parsed_prediction' style='background-color:grey'><pre>{raw}</pre></div>"
            action += f"<div class='action_object' style='background-color:grey'><pre>{{'raw': {raw!r}}}</pre></div>"
            action += f"<div class='parsed_action' style='background-color:yellow'><pre>{parsed}</pre></div>"
        new += f"<div class='predict_action'>{action}</div>\n"
        self.html = self.template(re.findall(r"<body>(.*?)</body>", self.html, re.DOTALL)[0] + new)
        self.said = said or parsed
        return self

    def write(self, folder, number=21):
        folder.mkdir(exist_ok=True)
        (folder / f"render_{number}.html").write_text(self.html)


def log(*lines):
    return "".join(f"2023-09-24 16:32:{i:02d},509 - INFO - {line}\n" for i, line in enumerate(lines))


def started(number=21):
    return f"[Config file]: /scratch/abc/{number}.json", f"[Intent]: {CONFIG['intent']}"


CLICK = ("Let me look.\n```click [12]```", "click [12] where [12] is [12] link 'Reviews (12)'")
STOP = ("Done. In summary: ```stop [Joseph Brzezinski]```", "stop [Joseph Brzezinski]")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "gpt4_cot"


def read(folder, **options) -> list[Any]:
    return list(logs.read("webarena", folder, **options))


def one(folder, renderer, *lines) -> Any:
    renderer.write(folder)
    if lines:
        (folder / "merged_log.txt").write_text(log(*lines))
    (got,) = read(folder)
    return got


def test_the_episode(folder):
    renderer = Renderer().page(*CLICK).page(*STOP, url="http://shop:7770/r#reviews")
    folder.mkdir()
    arguments = {"model": "gpt-4", "agent_type": "prompt", "temperature": 1.0, "top_p": 0.9, "max_tokens": 384}
    (folder / "config.json").write_text(json.dumps(arguments))
    got = one(folder, renderer, *started(), "[Result] (PASS) /scratch/abc/21.json", "Average score: 1.0")
    assert isinstance(got, Episode)
    assert (got.source, got.dataset, got.native_id, got.policy_id) == ("webarena", "gpt4_cot", "21", "gpt4_cot")
    assert (got.benchmark, got.task_id, got.task_family, got.site) == ("webarena", "webarena/21", "222", "shopping")
    assert (got.goal, got.start_url) == (CONFIG["intent"], CONFIG["start_url"])
    assert (got.model, got.agent) == ("gpt-4", "prompt")
    assert got.sampling == {"temperature": 1.0, "top_p": 0.9, "max_tokens": 384}
    assert (got.success, got.outcome_reward, got.raw_reward) == (True, 1.0, 1.0)
    assert (got.terminated, got.truncated, got.end_reason) == (True, False, "agent_stop")
    assert (got.final_answer, got.quality_flags) == ("Joseph Brzezinski", ())
    assert got.started_at == datetime(2023, 9, 24, 16, 32, tzinfo=UTC)
    assert got.extra["config"]["require_login"] == "True"
    first, second = got.steps
    assert (first.observation, first.observation_kind, first.url) == (TREE, "axtree", HOME)
    assert (first.response, first.thought) == (CLICK[0], "Let me look.")
    assert (first.action, first.action_name, first.action_args) == ("click [12]", "click", {"id": "12"})
    assert (first.action_grammar, first.target, first.screenshot) == ("webarena", {"ref": "12"}, None)
    assert first.extra == {"parsed_action": CLICK[1], "action_before": "None"}
    assert (second.url, second.action) == ("http://shop:7770/r#reviews", "stop [Joseph Brzezinski]")
    assert [(s.reward, s.reward_source) for s in got.steps] == [(0.0, "outcome"), (1.0, "outcome")]
    assert [s.terminated for s in got.steps] == [None, True]
    assert rows.convert(got, "i").n_steps == 2


@pytest.mark.parametrize(
    ("command", "args"),
    [
        ("type [4] [red [big] mug] [1]", {"id": "4", "text": "red [big] mug", "enter": "1"}),
        ("type [4] [red]", {"id": "4", "text": "red"}),
        ("hover [4]", {"id": "4"}),
        ("scroll [direction=down]", {"direction": "direction=down"}),
        ("press [Enter]", {"keys": "Enter"}),
        ("goto [http://x.com/?a[]=1]", {"url": "http://x.com/?a[]=1"}),
        ("go_back", {}),
        ("stop [N/A]", {"answer": "N/A"}),
        ("stop []", {"answer": ""}),
    ],
)
def test_commands(folder, command, args):
    got = one(folder, Renderer().page(f"```{command}```", "as parsed"))
    assert (got.steps[0].action, got.steps[0].action_args) == (command, args)


def test_no_log_is_unlabelled(folder):
    got = one(folder, Renderer().page(*CLICK).page(*STOP))
    assert (got.success, got.outcome_reward, got.quality_flags) == (None, None, ("unlabelled",))
    assert [s.reward for s in got.steps] == [None, None]
    assert (got.terminated, got.end_reason) == (True, "agent_stop")


def test_the_last_run_of_a_task_counts(folder):
    failed, passed = (f"[Result] ({verdict}) /scratch/abc/21.json" for verdict in ("FAIL", "PASS"))
    renderer = Renderer().page(*CLICK).page(*STOP)
    assert one(folder, renderer, *started(), failed, *started(), passed).success is True
    assert one(folder, renderer, *started(), passed, *started(), failed).steps[-1].reward == 0.0
    other = one(folder, renderer, *started(), passed, *started(3), "[Result] (FAIL) config_files/3.json")
    assert other.success is True
    crashed = one(folder, renderer, *started(), passed, *started(), "[Unhandled Error] TimeoutError('x')]")
    assert (crashed.success, crashed.extra["error"]) == (None, "[Unhandled Error] TimeoutError('x')]")


def test_words_of_the_agent_are_no_result(folder):
    said = "[Intent]: x [Result] (PASS) /scratch/21.json", "they say [Result] (PASS) /scratch/21.json"
    assert one(folder, Renderer().page(*STOP), *started(), *said).success is None


def test_log_files_beside(folder):
    Renderer().page(*STOP).write(folder)
    (folder / "log_files").mkdir()
    passed = log(*started(), "[Result] (PASS) /scratch/abc/21.json")
    (folder / "log_files" / "log_20230924163200_1.log").write_text(passed.replace("PASS", "FAIL"))
    (folder / "log_files" / "log_20230925163200_7.log").write_text(passed)
    (got,) = read(folder)
    assert got.success is True


@pytest.mark.parametrize(
    ("stop", "terminated", "truncated", "reason"),
    [
        ("stop [Early stop: Reach max steps 30]", False, True, "step_limit"),
        ("stop [Early stop: Get a numeric reward 1.00, test ends]", True, False, "env_done"),
        ("stop [Early stop: Same action for 3 times]", False, True, "agent_error"),
        ("stop [Early stop: Failed to parse actions for 3 times]", False, True, "agent_error"),
        ("stop [ERROR: no response]", None, None, "agent_error"),
    ],
)
def test_the_harness_stops(folder, stop, terminated, truncated, reason):
    renderer = Renderer().page(*CLICK).page("", stop, text="the last page")
    got = one(folder, renderer, *started(), "[Result] (FAIL) /scratch/abc/21.json")
    assert (got.terminated, got.truncated, got.end_reason, got.final_answer) == (terminated, truncated, reason, None)
    step, final = got.steps
    assert (step.terminated, step.truncated, step.reward) == (terminated, truncated, 0.0)
    assert (final.is_final_observation, final.observation, final.action) == (True, "the last page", None)
    assert (final.reward, final.response) == (None, None)
    assert rows.convert(got, "i").n_steps == 1


def test_an_agent_may_say_the_same(folder):
    got = one(folder, Renderer().page("```stop [Early stop: enough]```", "stop [Early stop: enough]"))
    assert (got.end_reason, got.final_answer, len(got.steps)) == ("agent_stop", "Early stop: enough", 1)


def test_a_run_without_stop(folder):
    renderer = Renderer().page(*CLICK)
    assert one(folder, renderer).end_reason == "unknown"
    ended = one(folder, renderer, *started(), "[Result] (FAIL) x/21.json")
    assert (ended.end_reason, ended.terminated, ended.success) == ("env_done", True, False)
    failed = one(folder, renderer, *started(), "[OpenAI Error] RateLimitError()")
    assert (failed.end_reason, failed.terminated, failed.quality_flags) == ("agent_error", None, ("unlabelled",))


def test_what_could_not_be_parsed_and_what_was_not_found(folder):
    lost = 'Attempt to perfom "click" on element "[99]" but no matching element found. Please check.'
    renderer = Renderer().page("I would rather not.", "none", said="The previous prediction you issued was ...")
    renderer.page("```click [99]```", "click [99] where [99] is No match found", said=lost).page(*STOP)
    none, missed, stop = one(folder, renderer).steps
    assert (none.action, none.action_valid, none.response) == (None, False, "I would rather not.")
    assert (missed.action, missed.action_error) == ("click [99]", lost)
    assert stop.action_error is None


def test_visualwebarena(folder):
    config = {"task_id": 4, "sites": ["classifieds"], "image": None, "intent": "Find it", "visual_difficulty": "easy"}
    got = one(folder, Renderer(config).page(*STOP, image=PNG))
    assert (got.benchmark, got.task_id) == ("visualwebarena", "visualwebarena/classifieds/4")
    shot = got.steps[0].screenshot
    assert (shot["status"], shot["mime"], shot["data"]) == ("ok", "image/png", PNG)
    assert got.steps[0].observation == TREE
    bare = replace(got.steps[0], screenshot={k: v for k, v in shot.items() if k != "data"})
    assert rows.convert(replace(got, steps=(bare,)), "i").n_steps == 1


def test_playwright_actions_are_code(folder):
    code = "page.get_by_role('link').click()"
    (folder).mkdir()
    (folder / "config.json").write_text('{"observation_type": "html", "action_set_tag": "playwright"}')
    (step,) = one(folder, Renderer().page(None, code)).steps
    assert (step.action, step.action_grammar, step.response, step.observation_kind) == (
        code,
        "playwright",
        None,
        "html",
    )


@pytest.mark.parametrize(
    "text",
    [
        "a </pre> b",
        "<div class='state_obv'><pre>inner",
        "<pre>x</pre></div>",
        "</pre><div>",
        "{body} {0}",
        "```click [1]```",
    ],
)
def test_pages_with_markup_of_their_own(folder, text):
    got = one(folder, Renderer().page(*CLICK, text=text).page(*STOP))
    assert [s.observation for s in got.steps] == [text, TREE]
    assert [s.action for s in got.steps] == ["click [12]", "stop [Joseph Brzezinski]"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x</pre><div>\n<div class='prev_action' style='background-color:pink'>y", "ambiguous_markup"),
        ("x</pre><div>\ny", "ambiguous_markup"),
        ("</a></h3>\n<div class='state_obv'><pre>", "ambiguous_markup"),
        ("x</div>\n<div class='predict_action'>stop", "ambiguous_markup"),
        ("<h2>New Page</h2>\n<h3 class='url'><a href=x", "damaged_render"),
        ("x </body> y", "damaged_render"),
    ],
)
def test_pages_that_imitate_the_renderer_are_refused(folder, text, reason):
    got = one(folder, Renderer().page(*CLICK, text=text).page(*STOP))
    assert isinstance(got, Rejected)
    assert got.reason == reason


def test_files_that_are_no_rendering(folder):
    whole = Renderer().page(*CLICK).html
    folder.mkdir()
    for i, data in enumerate(
        [
            b"",
            b"\xff" + whole.encode(),
            whole[:-40].encode(),
            Renderer().html.encode(),
            Renderer({"a": 1}).html.encode(),
        ]
    ):
        (folder / f"render_{i}.html").write_bytes(data)
    reasons = ["damaged_render", "invalid_utf8", "damaged_render", "no_steps", "missing_key"]
    assert [r.reason for r in read(folder)] == reasons


def test_a_broken_config_is_told(folder):
    folder.mkdir()
    (folder / "config.json").write_text("{")
    assert "ends too soon" in one(folder, Renderer().page(*STOP)).extra["arguments"]["config_error"]


def test_windows_line_ends(folder):
    renderer = Renderer().page(*CLICK)
    renderer.html = renderer.html.replace("\n", "\r\n")
    assert one(folder, renderer).steps[0].observation == TREE


def test_a_large_page_takes_linear_time(folder):
    hard = "</pre><div><img src='data:" * 200_000
    begin = time.monotonic()
    got = one(folder, Renderer().page(*CLICK, text=hard))
    assert got.steps[0].observation == hard
    assert time.monotonic() - begin < 5


def test_find_and_detect(tmp_path, folder):
    renderer = Renderer().page(*STOP)
    renderer.write(folder)
    renderer.write(tmp_path / "b", 7)
    (tmp_path / "traces").mkdir()
    form = logs.format_of("webarena")
    assert list(form.find(tmp_path)) == [tmp_path / "b", folder]
    assert [e.native_id for e in read(folder / "render_21.html")] == ["21"]
    assert form.detect(Sample(folder))
    assert form.detect(Sample(folder / "render_21.html"))
    assert form.detect(Sample(tmp_path)) is None
    with pytest.raises(UserError, match="holds no folder"):
        read(tmp_path / "traces")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_bytes_crash_it(folder, data):
    good = Renderer().page(*CLICK, image=PNG).page("", "stop [Early stop: Reach max steps 2]").html.encode()
    at = data.draw(st.integers(0, len(good)))
    junk = data.draw(
        st.one_of(st.binary(max_size=6), st.sampled_from([b"</pre>", b"<div>\n", b"</body>", b"```", b"["]))
    )
    folder.mkdir(exist_ok=True)
    (folder / "render_21.html").write_bytes(good[:at] + junk + good[at + data.draw(st.integers(0, 30)) :])
    (folder / "config.json").write_bytes(data.draw(st.binary(max_size=4)))
    (folder / "merged_log.txt").write_bytes(log(*started()).encode()[: at % 100] + junk)
    (got,) = read(folder)
    assert isinstance(got, Episode | Rejected)

"""Rollouts in a real Chromium, from the command line: on a task of our own, written as MiniWoB's are."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from offline_lm import collect
from offline_lm.envs import miniwob
from offline_lm.envs.browser import Session, find_chromium
from offline_lm.envs.gate import Gate
from offline_lm.errors import UserError
from offline_lm.store import Store

pytestmark = pytest.mark.browser

SANDBOX = f"sandbox={str(os.geteuid() != 0).lower()}"
CORE = """
var WOB_DONE_GLOBAL = false, WOB_RAW_REWARD_GLOBAL = 0, WOB_TASK_READY = true, core = {};
Math.seedrandom = seed => {
  let x = (seed + 1) * 123456789 % 2147483647;
  Math.random = () => (x = (x * 16807 + 11) % 2147483647) / 2147483647;
};
core.getUtterance = () => document.getElementById("query").textContent;
core.startEpisodeReal = () => genProblem();
core.endEpisode = reward => { WOB_RAW_REWARD_GLOBAL = reward; WOB_DONE_GLOBAL = true; };
"""
TASK = """<!DOCTYPE html><title>Task</title><script src="../core/core.js"></script>
<div id="query"></div><div id="area"></div>
<script>
  const names = ["One", "Two", "Three", "Four"];
  function genProblem() {
    const right = names[Math.floor(Math.random() * 4)];
    document.getElementById("query").textContent = `Click on the "${right}" button.`;
    for (const name of names.sort(() => Math.random() - 0.5)) {
      const button = document.createElement("button");
      button.textContent = name;
      button.onclick = () => setTimeout(() => core.endEpisode(name === right ? 0.5 : -1), 300);
      document.getElementById("area").append(button);
    }
    const idle = document.createElement("input");
    document.getElementById("area").append(idle);
  }
</script>"""


LEAVE = """<!DOCTYPE html><title>Leave</title><script src="../core/core.js"></script><div id="query">Go.</div>
<a href="../core/away.html">Away</a><script>function genProblem() {}</script>"""


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> Path:
    pytest.importorskip("playwright", reason="playwright is not installed: pip install 'offline_lm[online]'")

    async def start() -> None:
        session = Session(find_chromium(None), Gate(miniwob.ORIGIN), sandbox=os.geteuid() != 0)
        try:
            await session.browser()
        finally:
            await session.close()

    try:
        asyncio.run(start())
    except UserError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("html")
    for name, text in (
        ("core/core.js", CORE), ("core/away.html", "Elsewhere"), ("miniwob/click-button.html", TASK),
        ("miniwob/leave.html", LEAVE),
    ):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def run(html, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*argv: str):
        assert collect.main(["env=miniwob", f"miniwob_html={html}", SANDBOX, *argv, "json=true"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def rows(store: str) -> list[tuple]:
    with Store.open(store).connect() as db:
        return db.execute(
            "SELECT e.task_id, e.seed, e.goal, e.end_reason, e.success, e.outcome_reward, e.raw_reward, s.step, s.url,"
            " s.observation, s.action, s.action_error, s.reward, s.behavior_logprob, s.candidates::VARCHAR"
            " FROM episodes e JOIN steps s USING (episode_id) ORDER BY e.seed, s.step"
        ).fetchall()


def test_rollouts_of_a_task(run):
    """The rule solves every page; two pages at a time, or one after the other, give the same logs."""
    told = run("policy=scripted", "episodes=4", "pages=2", "store=two")
    assert (told["episodes"], told["steps"], told["success"], told["restarts"]) == (4, 4, 1.0, 0)
    run("policy=scripted", "episodes=4", "pages=1", "store=one")
    logged = rows("two")
    assert logged == rows("one")
    assert len({row[2] for row in logged}) > 1
    for task, _, goal, end, success, outcome, raw, step, url, page, action, error, reward, logprob, _ in logged:
        assert (task, end, success, outcome, raw) == ("miniwob/click-button", "env_done", True, 1.0, 0.5)
        assert url == "http://miniwob.test/miniwob/click-button.html"
        assert goal not in page
        if step == 0:
            name = goal.split('"')[1]
            (line,) = [line for line in page.split("\n") if f'"{name}"' in line]
            assert action == f"click('{line.split('ref=')[1].rstrip(']')}')"
            assert (error, reward, logprob) == (None, 1.0, 0.0)
        else:
            assert (action, reward) == (None, None)


def test_random_rollouts_have_failures_and_their_candidates(run):
    told = run("policy=random", "episodes=6", "max_steps=3", "store=a")
    assert told["end_reasons"].keys() <= {"env_done", "step_limit"}
    for *_, raw, _, _, page, action, _, reward, _, candidates in rows("a"):
        if action is None:
            continue
        assert candidates.count("'action'") == 4 + 2  # the field: a click, and what the goal quotes
        assert page.count("ref=") == 5
        assert reward in (0.0, 1.0)
        assert raw in (-1.0, 0.5, None)


@pytest.mark.parametrize("fresh", ["true", "false"])
def test_an_action_that_leads_away_is_a_transition(run, fresh):
    """The page there has no element: all that is offered is to do nothing."""
    told = run("policy=random", "tasks=[leave]", "episodes=2", "pages=1", "max_steps=2", f"fresh={fresh}", "store=a")
    assert (told["end_reasons"], told["failed_actions"], told["success"]) == ({"step_limit": 2}, 0, 0.0)
    taken = [(row[9].split()[-1], row[10], row[12]) for row in rows("a")]
    away = "Elsewhere"
    assert taken == [("[ref=e1]", "click('e1')", 0.0), (away, "noop()", 0.0), (away, None, None)] * 2


def test_a_kill_loses_none_that_ended_and_leaves_no_browser(html, tmp_path):
    """The browser is killed first: the collector goes on with another. Then the collector is."""
    command = [sys.executable, "-m", "offline_lm.collect", "env=miniwob", f"miniwob_html={html}", SANDBOX]
    command += ["policy=random", "episodes=1000", "store=a"]
    environment = os.environ | {"PYTHONPATH": str(Path(collect.__file__).parent.parent)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True)
    try:
        wait_for_commits(tmp_path, process, 3)
        (browser,) = browsers(process.pid)
        os.kill(browser, signal.SIGKILL)
        so_far = commits(tmp_path)
        wait_for_commits(tmp_path, process, so_far + 3)
        (other,) = browsers(process.pid)
        assert other != browser
        family = descendants(process.pid)
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() and not zombie(pid) for pid in family):
        assert time.monotonic() < deadline, "a browser is left"
        time.sleep(0.05)
    with Store.open(tmp_path / "a").connect() as db:
        found = db.execute(
            "SELECT n_steps = (SELECT count(*) FROM steps s WHERE s.episode_id = e.episode_id AND action IS NOT NULL),"
            " end_reason, outcome_reward, truncated FROM episodes e"
        ).fetchall()
    assert len(found) >= 6
    assert all(whole for whole, *_ in found)
    for _, end, reward, truncated in found:
        assert (reward is None) == (end == "env_error")
        assert truncated == (end != "env_done")


def commits(folder: Path) -> int:
    """Of episodes, the entry that made their table left out."""
    return len(list(folder.glob("a/tables/episodes/_delta_log/*.json"))) - 1


def wait_for_commits(folder: Path, process: subprocess.Popen, n: int) -> None:
    deadline = time.monotonic() + 120
    while commits(folder) < n:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)


def descendants(pid: int) -> list[int]:
    children = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in read(task / "children").split()]
    return [*children, *(one for child in children for one in descendants(child))] if children else []


def browsers(pid: int) -> list[int]:
    """Chromium's own first processes: those whose command names no `--type`."""
    lines = {one: read(Path(f"/proc/{one}/cmdline")) for one in descendants(pid)}
    return [one for one, line in lines.items() if "--remote-debugging" in line and "--type=" not in line]


def zombie(pid: int) -> bool:
    return ") Z " in read(Path(f"/proc/{pid}/stat"))


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it ended meanwhile
        return ""


def test_a_wheel_is_unpacked_and_nothing_beside_it(tmp_path):
    import zipfile

    wheel, folder = tmp_path / "miniwob.whl", tmp_path / "html"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("miniwob/html/miniwob/a.html", "a")
        archive.writestr("miniwob/html/core/core.js", "core")
        archive.writestr("miniwob/environment.py", "no")
    assert miniwob.unpack(wheel, folder) == 1
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*.*")) == ["core/core.js", "miniwob/a.html"]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("miniwob/html/../../../evil.html", "x")
    with pytest.raises(UserError, match="outside"):
        miniwob.unpack(wheel, folder)


def test_candidates_of_a_page():
    def element(ref, role="button", **options):
        return {"ref": ref, "role": role, "type": "", "options": None, "editable": False, "opens": False} | options

    page = [
        element("e1"),
        element("e2", "textbox", editable=True),
        element("e3", "textbox", editable=True, type="date"),
        element("e4", "combobox", options=["S", "M"]),
        element("e5", "menuitem", opens=True),
    ]
    assert miniwob.candidates(page, 'Enter "Bo" and 05/20/2010') == (
        "click('e1')", "click('e2')", "fill('e2', 'Bo')", "fill('e2', '05/20/2010')", "click('e3')",
        "fill('e3', '2010-05-20')", "select_option('e4', 'S')", "select_option('e4', 'M')", "click('e5')",
        "hover('e5')",
    )  # fmt: skip
    assert miniwob.texts_of("Type 9:37 PM") == ["9:37 PM"]
    assert miniwob.texts_of("Send Bo's mail to a.b@c.de") == ["Send", "Bo's", "mail", "to", "a.b@c.de"]

"""A real Chromium: what is seen of a page, what is done on it, and what it cannot reach."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from offline_lm.envs import browser
from offline_lm.envs.action_grammar import parse
from offline_lm.envs.browser import Failed, Session, Tab, find_chromium
from offline_lm.envs.gate import Gate
from offline_lm.envs.protocol import Lost
from offline_lm.errors import UserError

ORIGIN = "http://pages.test"
PAGE = """<!DOCTYPE html><title>A page</title>
<style>#box { transition: margin-left 60s; margin-left: 0 } #under { position: relative }
#over { position: absolute; left: 0; top: 0; width: 400px; height: 80px; background: white }</style>
<h1>Sign   up</h1>
<p>Read <span id="terms">the terms</span> first, <b>all</b> of them.</p>
<label for="name">Name</label> <input id="name" value="Ann">
<label><input type="checkbox" id="news"> Send news</label>
<input type="password" placeholder="Password"><input type="hidden" value="s3cret"><p hidden>unseen</p>
<select id="size"><option>Small<option selected>Large</select>
<textarea>two
lines</textarea><input type="date" id="day">
<ul><li>one<li>two</ul>
<div id="box">box</div><button id="go">Go &gt; "now"</button><button disabled>No</button>
<div id="under"><button id="deep">Deep</button><div id="over">over</div></div>
<script>
  const did = [];
  for (const kind of ["input", "change", "click", "keydown", "mouseover"])
    document.addEventListener(kind, event => did.push(kind + " " + (event.target.id || event.target.tagName)));
  const [terms, go, box] = ["terms", "go", "box"].map(id => document.getElementById(id));
  terms.addEventListener("click", () => { box.style.marginLeft = "9px" });
  go.onclick = () => setTimeout(() => { box.textContent = "later" }, 400);
</script>"""
SEEN = """- heading "Sign up"
- text: Read
- generic "the terms" [ref=e1]
- text: first, all of them.
- textbox "Name" [ref=e2]: Ann
- checkbox "Send news" [ref=e3]
- textbox "Password" [ref=e4]
- combobox [ref=e5]
  - option "Small"
  - option "Large" [selected]
- textbox [multiline] [ref=e6]: two lines
- textbox [ref=e7]
- list
  - listitem "one"
  - listitem "two"
- text: box
- button "Go > \\"now\\"" [ref=e8]
- button "No" [disabled]
- button "Deep" [ref=e9]
- text: over"""


def test_a_wrong_setting_is_named(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="chromium=/no/such/one: no executable"):
        find_chromium("/no/such/one")
    monkeypatch.setenv("OFFLINE_LM_CHROMIUM", str(tmp_path))
    with pytest.raises(UserError, match=r"\$OFFLINE_LM_CHROMIUM=.*: no executable"):
        find_chromium(None)
    monkeypatch.delenv("OFFLINE_LM_CHROMIUM")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(browser, "_PLACES", ())
    with pytest.raises(UserError, match="no Chromium found: `apt-get install chromium`"):
        find_chromium(None)
    (tmp_path / "chromium").write_text("#!/bin/sh\n")
    (tmp_path / "chromium").chmod(0o755)
    assert find_chromium(None) == str(tmp_path / "chromium")


def test_root_must_say_that_there_is_no_sandbox(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(UserError, match="sandbox=false"):
        Session("chromium", Gate(ORIGIN))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(browser, "find_spec", lambda name: name)
    assert Session("chromium", Gate(ORIGIN)).sandbox


def test_a_missing_playwright_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "playwright", None)
    with pytest.raises(UserError, match=r"pip install 'offline_lm\[online\]'"):
        Session("chromium", Gate(ORIGIN), sandbox=False)


def test_a_browser_that_hangs_is_given_up(monkeypatch):
    pytest.importorskip("playwright")
    stopped = []

    class Hung:
        def is_connected(self):
            return True

        async def close(self):
            await asyncio.sleep(60)

        async def stop(self):
            stopped.append(True)

    async def run():
        session = Session("chromium", Gate(ORIGIN), sandbox=False)
        monkeypatch.setattr(session, "_browser", Hung())
        monkeypatch.setattr(session, "_playwright", Hung())
        await asyncio.wait_for(session.close(), 5)

    monkeypatch.setattr(browser, "CLOSE_TIMEOUT_S", 0.01)
    asyncio.run(run())
    assert stopped == [True]


@pytest.fixture(scope="session")
def chromium() -> str:
    """One that starts."""
    pytest.importorskip("playwright", reason="playwright is not installed: pip install 'offline_lm[online]'")

    async def start(executable: str) -> None:
        session = Session(executable, Gate(ORIGIN), sandbox=os.geteuid() != 0)
        try:
            await session.browser()
        finally:
            await session.close()

    try:
        executable = find_chromium(None)
        asyncio.run(start(executable))
    except UserError as error:
        pytest.skip(str(error))
    return executable


@pytest.fixture
def play(chromium, tmp_path: Path):
    """Runs a coroutine function of a tab that shows `PAGE`."""
    (tmp_path / "page.html").write_text(PAGE)
    (tmp_path / "hang.html").write_text("<body onclick='while (true);'><button>Hang</button>")

    def play(body, **options):
        async def run():
            session = Session(chromium, Gate(ORIGIN, tmp_path), sandbox=os.geteuid() != 0)
            tab = Tab(session, viewport=(500, 400), **options)
            try:
                await tab.open(f"{ORIGIN}/page.html")
                return await body(tab)
            finally:
                await tab.close()
                await session.close()

        return asyncio.run(run())

    return play


async def do(tab: Tab, action: str) -> str:
    await tab.act(parse(action))
    await tab.settle()
    return (await tab.look())[0]


@pytest.mark.browser
def test_a_page_is_seen_and_acted_on(play):
    async def body(tab: Tab):
        text, title = await tab.look("document.title")
        assert (text, title, tab.url) == (SEEN, "A page", f"{ORIGIN}/page.html")
        changed = []
        before = text
        for action in (
            "fill('e2', 'it\\'s \"x\" </script>')", "click('e3')", "select_option('e5', 'Small')", "click('e8')",
            "fill('e7', '2010-05-20')", "clear('e6')", "press('e2', 'Shift+Z')", "click('e1')",
        ):  # fmt: skip
            after = await do(tab, action)
            changed.append([line for line in after.split("\n") if line not in before.split("\n")])
            before = after
        assert changed == [
            ["- textbox \"Name\" [active] [ref=e2]: it's \"x\" </script>"],
            ['- textbox "Name" [ref=e2]: it\'s "x" </script>', '- checkbox "Send news" [checked] [active] [ref=e3]'],
            ['- checkbox "Send news" [checked] [ref=e3]', "- combobox [active] [ref=e5]",
             '  - option "Small" [selected]', '  - option "Large"'],
            ["- combobox [ref=e5]", "- text: later", '- button "Go > \\"now\\"" [active] [ref=e8]'],
            ["- textbox [active] [ref=e7]: 2010-05-20", '- button "Go > \\"now\\"" [ref=e8]'],
            ["- textbox [multiline] [active] [ref=e6]", "- textbox [ref=e7]: 2010-05-20"],
            ['- textbox "Name" [active] [ref=e2]: it\'s "x" </script>Z', "- textbox [multiline] [ref=e6]"],
            ['- textbox "Name" [ref=e2]: it\'s "x" </script>Z'],
        ]  # fmt: skip
        did = await tab.evaluate("() => did")
        assert "input name" in did
        assert "change name" in did  # when it lost the focus
        assert did.count("change size") == 1
        # A transition of 60 s is over at once.
        assert await tab.evaluate("() => getComputedStyle(document.getElementById('box')).marginLeft") == "9px"

    play(body)


@pytest.mark.browser
def test_what_cannot_be_done_is_told(play):
    async def body(tab: Tab):
        await tab.look()
        for action, said in (
            ("click('e77')", "there is no element e77"),
            ("click('e9')", "e9 is covered by something else"),
            ("fill('e8', 'x')", "e8 is no field to write in"),
            ("fill('e7', 'tomorrow')", "does not take this text"),
            ("select_option('e5', 'Medium')", "e5 has no option 'Medium'"),
            ("select_option('e2', 'Medium')", "e2 is no list of options"),
            ("press('e2', 'NoKey')", "Unknown key"),
        ):
            with pytest.raises(Failed, match=said):
                await tab.act(parse(action))
        await tab.evaluate("() => document.getElementById('name').remove()")
        with pytest.raises(Failed, match="e2 is gone"):
            await tab.act(parse("fill('e2', 'x')"))

    play(body)


@pytest.mark.browser
def test_a_bug_of_the_page_is_no_crash(play):
    """Its timer throws; the others run all the same, and time passes."""

    async def body(tab: Tab):
        await tab.evaluate("() => { setTimeout(() => { throw Error('mine') }, 100); setTimeout(go.onclick, 50); }")
        now = await tab.evaluate("() => Date.now()")
        await tab.settle()
        assert await tab.evaluate("() => [Date.now(), box.textContent]") == [now + browser.SETTLE_MS, "later"]
        await tab.evaluate("() => { setTimeout(() => { throw Error('mine') }, 100); }")
        await tab.rewind()

    play(body)


@pytest.mark.browser
def test_time_stands_still_and_begins_anew_with_each_page(play):
    async def body(tab: Tab):
        times = []
        for _ in range(2):
            await tab.open(f"{ORIGIN}/page.html")
            await tab.settle()
            await asyncio.sleep(0.05)
            times.append(await tab.evaluate("() => Date.now()"))
            await tab.settle()
            times.append(await tab.evaluate("() => Date.now()"))
        assert times[1] - times[0] == browser.SETTLE_MS
        assert times[2:] == times[:2]

    play(body)


@pytest.mark.browser
def test_nothing_but_the_origin_is_reached(play):
    """Without the gate every attempt would show in `reached`: a server listens at the other port."""

    async def body(tab: Tab):
        reached = []

        async def answer(reader, writer):
            reached.append(await reader.readline())
            writer.close()

        other = await asyncio.start_server(answer, "127.0.0.1", 0)
        host = f"127.0.0.1:{other.sockets[0].getsockname()[1]}"
        wait = (
            "new Promise(done => {{"
            " const x = {}; x.onopen = x.onload = () => done('in'); x.onerror = () => done('out') }})"
        )
        tries = {
            "fetch": f"fetch('http://{host}/', {{mode: 'no-cors'}}).then(() => 'answered')",
            "socket": wait.format(f"new WebSocket('ws://{host}/')"),
            "image": wait.format(f"Object.assign(new Image(), {{src: 'http://{host}/i'}})"),
            "file": "fetch('file:///etc/passwd').then(() => 'in', () => 'out')",
            "own": f"fetch('{ORIGIN}/page.html').then(r => r.status)",
        }
        got = {name: await tab.evaluate(f"() => {script}") for name, script in tries.items()}
        # It is the gate that answers: 403.
        assert got == {"fetch": "answered", "socket": "out", "image": "out", "file": "out", "own": 200}
        await tab.evaluate(f"() => {{ open('http://{host}/popup'); return null }}")
        assert tab._context is not None
        async with asyncio.timeout(10):  # the popup opens, is refused and closed
            await asyncio.sleep(0.3)
            while len(tab._context.pages) > 1:
                await asyncio.sleep(0.05)
        other.close()
        assert reached == []
        assert sum(host in line for line in tab.session.gate.refused) >= 3

    play(body)


@pytest.mark.browser
def test_a_killed_browser_and_a_hung_page_are_lost_and_come_back(play, monkeypatch):
    monkeypatch.setattr(browser, "INFRASTRUCTURE_TIMEOUT_S", 5.0)

    async def body(tab: Tab):
        cdp = await (await tab.session.browser()).new_browser_cdp_session()
        (pid,) = [
            p["id"] for p in (await cdp.send("SystemInfo.getProcessInfo"))["processInfo"] if p["type"] == "browser"
        ]
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(Lost):
            await tab.look()
        await tab.close()
        await tab.open(f"{ORIGIN}/page.html")
        assert (await tab.look())[0] == SEEN
        assert tab.session.restarts == 1

        await tab.open(f"{ORIGIN}/hang.html")
        await tab.look()
        monkeypatch.setattr(browser, "INFRASTRUCTURE_TIMEOUT_S", 1.0)
        monkeypatch.setattr(browser, "ACTION_TIMEOUT_S", 1.0)
        with pytest.raises(Failed, match="took more than 1 s"):
            await tab.act(parse("click('e1')"))
        with pytest.raises(Lost, match="no answer"):
            await tab.settle()
        await tab.close()
        monkeypatch.setattr(browser, "INFRASTRUCTURE_TIMEOUT_S", 15.0)
        await tab.open(f"{ORIGIN}/page.html")
        assert (await tab.look())[0] == SEEN

    play(body)

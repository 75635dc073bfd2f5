"""A Chromium, driven through Playwright: safe to show untrusted pages to, the same in every run, and restarted when it
dies.

Time in a page stands still, and is moved on by `SETTLE_MS` after each action: timers, animations by script and dates
run by that clock alone, so that nothing has to be waited for and runs repeat exactly. (Not governed: how long a server
takes, and CSS animations, which are switched off.)
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Awaitable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import orjson

from offline_lm.envs.action_grammar import Action
from offline_lm.envs.gate import Gate
from offline_lm.envs.protocol import Lost
from offline_lm.errors import UserError

if TYPE_CHECKING:
    from playwright.async_api import Browser, BrowserContext, Page, Playwright

T = TypeVar("T")

ENVIRONMENT_VARIABLE = "OFFLINE_LM_CHROMIUM"
SETTLE_MS = 500
"""Page time after an action, as BrowserGym waits in real time."""
ACTION_TIMEOUT_S = 2.0
INFRASTRUCTURE_TIMEOUT_S = 15.0
CLOSE_TIMEOUT_S = 10.0
EPISODES_PER_CONTEXT = 200
"""Then a tab starts afresh: what a renderer holds on to is bounded."""

STARTS = 2
"""How often a browser that dies while it starts is started."""

_NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
_PLACES = ("/usr/lib/chromium/chromium", "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
_SNAPSHOT = Path(__file__).with_name("snapshot.js")
_STILL = "*,*::before,*::after{transition:none!important;animation:none!important;caret-color:transparent!important}"
_ZERO = datetime(2024, 1, 1, 12, tzinfo=UTC)
"""The time in every page when it is loaded."""
# The last --disable-features undoes those before it: so Playwright 1.65's are among ours.
_FEATURES = (
    "AimEnabled AutofillServerCommunication AvoidCorsURLLoaderRestartOnRedirect"
    " AvoidUnnecessaryBeforeUnloadCheckSync DestroyProfileOnBrowserClose HttpsFirstBalancedModeAutoEnable HttpsUpgrades"
    " LensOverlay MediaRouter NetworkTimeServiceQuerying OptimizationHints PaintHolding PreconnectToSearch"
    " TcpPortRandomizationWin ThirdPartyStoragePartitioning Translate"
)
_ARGUMENTS = (
    f"--disable-features={_FEATURES.replace(' ', ',')}",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-webrtc-ip-handling-policy=disable_non_proxied_udp",
    # Names are the proxy's to resolve: a link's dns-prefetch would tell them to the network.
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)


class Failed(Exception):
    """An action that could not be done; the message is the agent's to read."""


def find_chromium(setting: str | None) -> str:
    """The executable: what `setting` says, else $OFFLINE_LM_CHROMIUM, else one of the usual places.

    Raises:
        UserError: there is none.
    """
    for given, by in ((setting, "chromium="), (os.environ.get(ENVIRONMENT_VARIABLE), f"${ENVIRONMENT_VARIABLE}=")):
        if given:
            if found := shutil.which(given):
                return found
            raise UserError(f"{by}{given}: no executable there")
    for place in (*_NAMES, *_PLACES):
        if found := shutil.which(place):
            return found
    raise UserError(
        "no Chromium found: `apt-get install chromium`, or name one with chromium=PATH or $" + ENVIRONMENT_VARIABLE
    )


class Session:
    """One Chromium, and as many tabs in it as are asked for.

    Args:
        executable: of Chromium, as `find_chromium` gives it.
        gate: what the pages may reach.
        sandbox: Chromium's own; only a user that is not root can have it.

    Raises:
        UserError: playwright is not installed; root wants a sandbox; Chromium does not start.
    """

    def __init__(self, executable: str, gate: Gate, *, sandbox: bool = True) -> None:
        if sandbox and os.geteuid() == 0:
            raise UserError("Chromium has no sandbox for root: be another user, or say sandbox=false")
        if find_spec("playwright") is None:
            raise UserError("a browser needs `pip install 'offline_lm[online]'`")
        self.executable, self.gate, self.sandbox = executable, gate, sandbox
        self.restarts = 0
        self._lock = asyncio.Lock()
        self._playwright: Playwright | None = None
        self._browser: Browser | None = None
        self._proxy = ""

    async def browser(self) -> Browser:
        """The running one; a new one if it has died."""
        async with self._lock:
            if self._browser is None or not self._browser.is_connected():
                self.restarts += self._browser is not None
                self._browser = await self._start()
            return self._browser

    async def _start(self) -> Browser:
        from playwright.async_api import Error, async_playwright

        if self._playwright is None:
            self._proxy = await self.gate.open()
            self._playwright = await async_playwright().start()
        why: Error | None = None
        for _ in range(STARTS):
            try:
                return await self._playwright.chromium.launch(
                    executable_path=self.executable,
                    chromium_sandbox=self.sandbox,
                    proxy={"server": self._proxy},
                    args=list(_ARGUMENTS),
                    # Signals are the collector's: it lets what is under way end first.
                    handle_sigint=False,
                    handle_sigterm=False,
                    handle_sighup=False,
                    timeout=4000 * INFRASTRUCTURE_TIMEOUT_S,
                )
            except Error as error:
                why = error
        assert why is not None
        raise UserError(f"{self.executable} does not start: {why.message}") from why

    async def close(self) -> None:
        """Ends the browser, also one that hangs or has died."""
        from playwright.async_api import Error

        try:
            if self._browser is not None and self._browser.is_connected():
                with suppress(Error, TimeoutError):  # stopping playwright kills what is left
                    await asyncio.wait_for(self._browser.close(), CLOSE_TIMEOUT_S)
        finally:
            if self._playwright is not None:
                await self._playwright.stop()
            await self.gate.close()


class Tab:
    """One page, in a context of its own: no cookie or storage is shared with other tabs.

    Args:
        viewport: width and height in CSS pixels.
        hidden: CSS selectors of what no snapshot shows.
    """

    def __init__(self, session: Session, *, viewport: tuple[int, int], hidden: tuple[str, ...] = ()) -> None:
        self.session, self.viewport, self.hidden = session, viewport, hidden
        self.elements: dict[str, dict[str, Any]] = {}
        """Of the last snapshot, by reference: role, tag, name, x, y ... (`snapshot.js`)."""
        self._context: BrowserContext | None = None
        self._page: Page | None = None
        self._opened = 0

    async def open(self, url: str) -> None:
        """Loads a page afresh; its clock stands at `_ZERO`.

        Raises:
            Lost: it does not load.
        """
        self._opened += 1
        if self._page is None or self._opened % EPISODES_PER_CONTEXT == 0:
            await self.close()
            await self._guard(self._new(), 4 * INFRASTRUCTURE_TIMEOUT_S)
        await self.rewind()
        assert self._page is not None
        await self._guard(self._page.goto(url, wait_until="load"))
        await self.evaluate("() => __offline_lm.ready()")

    async def rewind(self) -> None:
        """Clock and mouse as at the beginning: where the mouse last was, something may open on the next page."""
        assert self._page is not None
        await self._guard(self._page.mouse.move(0, 0))
        await self._guard(self._page.clock.install(time=_ZERO))
        await self._guard(self._pass(self._page.clock.pause_at(_ZERO + timedelta(seconds=1))))

    async def _new(self) -> None:
        browser = await self.session.browser()
        width, height = self.viewport
        self._context = await browser.new_context(
            viewport={"width": width, "height": height},
            locale="en-US",
            timezone_id="UTC",
            service_workers="block",
            accept_downloads=False,
        )
        script = f"{_SNAPSHOT.read_text('utf-8')};__offline_lm.hidden = {orjson.dumps(self.hidden).decode()};"
        await self._context.add_init_script(f"{script}__offline_lm.still({_STILL!r});")
        self._page = await self._context.new_page()
        self._context.on("page", lambda other: asyncio.ensure_future(other.close()))

    async def evaluate(self, script: str, argument: Any = None) -> Any:
        """The value of a function of ours in the page. Nothing that a page or an agent wrote is ever part of `script`.

        Raises:
            Lost: the page does not answer.
        """
        assert self._page is not None
        return await self._guard(self._page.evaluate(script, argument))

    async def settle(self) -> None:
        """Lets `SETTLE_MS` of page time pass."""
        assert self._page is not None
        await self._guard(self._pass(self._page.clock.run_for(SETTLE_MS)))

    async def _pass(self, time: Awaitable[None]) -> None:
        """Moves the clock. When all timers have run it rethrows what one of the page's own threw: a bug, no crash."""
        from playwright.async_api import Error

        try:
            await time
        except Error:
            if self._dead():
                raise

    async def look(self, also: str = "null") -> tuple[str, Any]:
        """(text of the page, value of the expression `also`), and notes the elements."""
        seen, other = await self.evaluate(f"async () => [await __offline_lm.look(), {also}]")
        self.elements = {element["ref"]: element for element in seen["elements"]}
        self.url, self.title = seen["url"], seen["title"]
        return seen["text"], other

    async def act(self, action: Action) -> None:
        """Does one action with real input events, where there are any.

        Raises:
            Failed: it cannot be done; the page may have seen a part of it.
            Lost: the browser died.
        """
        from playwright.async_api import Error

        for ref in action.refs:
            if ref not in self.elements:
                raise Failed(f"there is no element {ref} on this page")
        try:
            async with asyncio.timeout(ACTION_TIMEOUT_S):
                await self._act(action)
        except TimeoutError as error:
            raise Failed(f"{action.name} took more than {ACTION_TIMEOUT_S:g} s") from error
        except Error as error:
            if self._dead():
                raise Lost(error.message) from error
            raise Failed(error.message.splitlines()[0]) from error

    async def _act(self, action: Action) -> None:
        assert self._page is not None
        page, args = self._page, action.args
        ref = action.refs[0] if action.refs else ""
        match action.name:
            case "click":
                await page.mouse.click(*await self._point(ref))
            case "dblclick":
                await page.mouse.dblclick(*await self._point(ref))
            case "hover":
                await page.mouse.move(*await self._point(ref))
            case "drag_and_drop":
                await page.mouse.move(*await self._point(ref))
                await page.mouse.down()
                await page.mouse.move(*await self._point(action.refs[1], scroll=False), steps=5)
                await page.mouse.up()
            case "mouse_click":
                await page.mouse.click(float(args["x"]), float(args["y"]))
            case "scroll":
                await page.mouse.wheel(float(args["delta_x"]), float(args["delta_y"]))
            case "focus":
                await self._edit(ref, None)
            case "fill" | "clear":
                text = str(args.get("value", ""))
                if not await self._edit(ref, text):
                    await (page.keyboard.insert_text(text) if text else page.keyboard.press("Delete"))
            case "select_option":
                if self.elements[ref]["options"] is None:
                    raise Failed(f"{ref} is no list of options")
                chosen = await page.evaluate("([r, o]) => __offline_lm.choose(r, o)", [ref, args["options"]])
                if not chosen:
                    raise Failed(f"{ref} has no option {args['options']!r}")
            case "press":
                await self._edit(ref, None)
                await page.keyboard.press(str(args["key_comb"]))
            case "keyboard_press":
                await page.keyboard.press(str(args["key"]))
            case "noop":
                pass

    async def _edit(self, ref: str, text: str | None) -> bool:
        """Focuses an element; with a text, a field takes it, and true is given, or is ready for it to be typed."""
        if text is not None and not self.elements[ref]["editable"]:
            raise Failed(f"{ref} is no field to write in")
        assert self._page is not None
        script = "r => __offline_lm.focus(r)" if text is None else "([r, t]) => __offline_lm.edit(r, t)"
        set_ = await self._page.evaluate(script, ref if text is None else [ref, text])
        if set_ is None:
            raise Failed(f"{ref} is gone from the page")
        return set_

    async def _point(self, ref: str, scroll: bool = True) -> tuple[float, float]:
        """The middle of an element, brought into view if need be."""
        at = self.elements[ref]
        if not at["reached"] and scroll:
            assert self._page is not None
            at = await self._page.evaluate("r => __offline_lm.locate(r)", ref)
            if at is None:
                raise Failed(f"{ref} is gone from the page")
            if not at["reached"]:
                raise Failed(f"{ref} is covered by something else")
        return at["x"], at["y"]

    def _dead(self) -> bool:
        """Whether browser or page is gone."""
        browser = None if self._context is None else self._context.browser
        return self._page is None or self._page.is_closed() or browser is None or not browser.is_connected()

    async def _guard(self, work: Awaitable[T], seconds: float | None = None) -> T:
        """What `work` gives. Raises Lost where it fails or hangs: after that the tab must be closed."""
        from playwright.async_api import Error

        seconds = seconds or INFRASTRUCTURE_TIMEOUT_S
        try:
            return await asyncio.wait_for(work, seconds)
        except TimeoutError as error:
            raise Lost(f"no answer from the page in {seconds:g} s") from error
        except Error as error:
            raise Lost(error.message.splitlines()[0]) from error

    async def close(self) -> None:
        """Forgets page and context; the next `open` makes new ones."""
        from playwright.async_api import Error

        context, self._context, self._page = self._context, None, None
        if context is not None:
            with suppress(Error, TimeoutError):  # it died: nothing is left to close
                await asyncio.wait_for(context.close(), INFRASTRUCTURE_TIMEOUT_S)

"""A headless Chromium for tests of HTML pages, driven over a pair of pipes by its own protocol, without a package for it.

    with Browser() as browser:
        sight = browser.look(Path("page.html"), width=375, dark=True)
    assert not sight.problems

`look` reports what no page of ours may have: a body wider than the window, errors on the console, and anything fetched.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

PATIENCE = 120
"""Seconds without a word from Chromium after which a test fails."""
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDEST = """
[document.documentElement.scrollWidth - document.documentElement.clientWidth,
 [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1
   && !(function scrolls(p) { return p && p !== document.body && (getComputedStyle(p).overflowX !== 'visible' || scrolls(p.parentElement)) })(e.parentElement)
   ).slice(0, 3).map(e => e.tagName + '.' + e.getAttribute('class'))]
"""
"""JavaScript: by how many pixels the document is too wide, and the elements that stand out of the window."""


@dataclass
class Sight:
    """What a page looked like and did."""

    problems: list[str] = field(default_factory=list)
    """Overflow, console errors and requests, each in words."""
    background: str = ""
    """Computed colour of the body's background, such as `rgb(15, 19, 26)`."""


def require_chromium() -> str:
    """Return the path of Chromium; skip the test where there is none, but fail in CI, where nobody reads a skip."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    reason = "no Chromium on this machine: pages are not looked at; install Debian's package `chromium`"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


class Browser:
    """One Chromium process, with one tab at a time."""

    def __init__(self) -> None:
        self.profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        commands, self._out = os.pipe()
        self._in, answers = os.pipe()
        # Chromium reads its commands from descriptor 3 and answers on 4. The copies' numbers are above both.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands, answers)]
        os.close(commands)
        os.close(answers)
        command = [require_chromium(), "--headless", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu"]
        command += [f"--user-data-dir={self.profile.name}", "--disable-dev-shm-usage", "--hide-scrollbars"]
        command += ["--no-sandbox"] * (os.geteuid() == 0)  # root has no sandbox; the pages are our own
        as_3_and_4 = f'exec "$0" "$@" 3<&{ends[0]} 4>&{ends[1]} {ends[0]}<&- {ends[1]}>&-'
        self.process = subprocess.Popen(
            ["bash", "-c", as_3_and_4, *command],
            pass_fds=ends,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in ends:
            os.close(end)
        self._number, self._buffer, self.events = 0, b"", []  # type: int, bytes, list[dict[str, Any]]
        self._session = self._target = ""

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()
        os.close(self._out)
        os.close(self._in)
        self.profile.cleanup()

    def _open_tab(self) -> None:
        """Open a new tab and close the former one, so that what a former page still has to say is not taken for this one's."""
        former, self._session = self._target, ""
        self._target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=self._target, flatten=True)["sessionId"]
        if former:
            self.call("Target.closeTarget", targetId=former)
        self._session = session
        self.events.clear()
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _read(self) -> dict[str, Any]:
        """Return the next message: the answer to a call, or an event."""
        while b"\0" not in self._buffer:
            poll = select.poll()  # select.select knows no descriptor above 1,023, and a long test session has them
            poll.register(self._in, select.POLLIN)
            assert poll.poll(1000 * PATIENCE), f"Chromium has said nothing for {PATIENCE} s"
            part = os.read(self._in, 1 << 20)
            assert part, "Chromium ended"
            self._buffer += part
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        text = json.dumps(message).encode() + b"\0"
        while text:
            text = text[os.write(self._out, text) :]
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer}"
                return answer["result"]
            self._keep(answer)

    def _keep(self, event: dict[str, Any]) -> None:
        if event.get("sessionId") == self._session:
            self.events.append(event)

    def wait_for(self, event: str) -> None:
        """Wait until an event comes; it may have come since the tab was opened."""
        while not any(seen.get("method") == event for seen in self.events):
            self._keep(self._read())

    def evaluate(self, script: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def look(self, page: Path, width: int = 1280, dark: bool = False, media: str = "screen") -> Sight:
        """Open a page and report what is wrong with it.

        Args:
            page: the HTML file.
            width: of the window, in CSS pixels.
            dark: whether the reader prefers dark colours.
            media: `screen` or `print`.
        """
        self._open_tab()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        address = page.resolve().as_uri()
        answer = self.call("Page.navigate", url=address)
        assert "errorText" not in answer, f"{page}: {answer['errorText']}"
        self.wait_for("Page.loadEventFired")
        sight = Sight(background=self.evaluate("getComputedStyle(document.body).backgroundColor"))
        # One turn of the event loop, so that messages of the page's own scripts are here before the verdict.
        self.evaluate("new Promise(done => setTimeout(done))")
        if overflow := self.overflow():
            sight.problems.append(f"{page.name} at {width} px: {overflow}")
        sight.problems += [problem for event in self.events if (problem := _problem(event, address))]
        return sight

    def overflow(self) -> str:
        """Return by how much the page is wider than its window, and some elements that are; empty where it fits."""
        too_wide, elements = self.evaluate(WIDEST)
        return f"{too_wide} px too wide: {elements}" if too_wide > 0 or elements else ""

    def screenshot(self, path: Path) -> None:
        """Write the whole page as it is now (PNG)."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        path.write_bytes(base64.b64decode(picture))


def _problem(event: dict[str, Any], address: str) -> str:
    """Return what is wrong by an event of a page; empty where nothing is."""
    details = event.get("params", {})
    if event["method"] == "Runtime.exceptionThrown":
        return f"a script failed: {details['exceptionDetails'].get('exception', details['exceptionDetails'])}"
    if event["method"] == "Runtime.consoleAPICalled" and details["type"] in ("error", "warning", "assert"):
        return f"console.{details['type']}: {details['args']}"
    if event["method"] == "Log.entryAdded" and details["entry"]["level"] in ("error", "warning"):
        return f"the console says: {details['entry']['text']} ({details['entry'].get('url', '')})"
    if event["method"] == "Network.requestWillBeSent":
        url = details["request"]["url"]
        if not url.startswith("data:") and url != address:
            return f"it fetches {url}"
    return ""

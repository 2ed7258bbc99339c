"""A real browser under the tests' control: Chromium over its own debugging pipe, without a further package. Tests only.

`find()` names the browser, or says why there is none; `Page` loads a file, clicks, types and reports what the console said.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WHY_NOT = f"no browser: none of {', '.join(NAMES)} is on the PATH, nor is ZOOMR_BROWSER set"
ANSWER_S = 300  # for a machine that is busy with other things


def find() -> str | None:
    """The browser's path: ZOOMR_BROWSER, else the first of NAMES."""
    return os.environ.get("ZOOMR_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One page in one browser process. ``said`` collects console messages, exceptions and refused loads."""

    def __init__(self, browser: str) -> None:
        self._home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        # the pipe has to be descriptors 3 and 4; by way of high ones, as 3 and 4 may be either of them
        wiring = (
            f"import os, sys; os.dup2({to_browser}, 100); os.dup2({from_browser}, 101); os.dup2(100, 3); os.dup2(101, 4);"
            " os.execv(sys.argv[1], sys.argv[1:])"
        )
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run",
                 "--remote-debugging-pipe", f"--user-data-dir={self._home.name}", "about:blank"]  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-c", wiring, browser, *flags], pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._number, self._session = b"", 0, None
        self.said: list[str] = []
        self._loaded = False
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)
        self._home.cleanup()

    def look(self, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Size of the window in CSS pixels, and the colour scheme that the user prefers."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)

    def load(self, path: Path, fragment: str = "") -> None:
        """Open a file, perhaps at a ``#fragment``, and wait for it; what was said before is forgotten."""
        self._go("about:blank")  # another fragment alone would load nothing
        self.said.clear()
        self._go(path.resolve().as_uri() + fragment)

    def _go(self, url: str) -> None:
        self._loaded = False
        self.call("Page.navigate", url=url)
        end = time.monotonic() + ANSWER_S
        while not self._loaded:
            self._receive(end)

    def run(self, script: str):
        """The value of a JavaScript expression in the page, or what it promises."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def met(self, selector: str) -> None:
        """Return once there is such an element: a page hears some events a moment after they happened."""
        look = f"document.querySelector({json.dumps(selector)}) ? done() : setTimeout(look, 20)"
        self.run(f"new Promise(done => {{ const look = () => {look}; look(); }})")

    def click(self, selector: str) -> None:
        """A real click with the mouse in the middle of the element."""
        self.run(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        x, y = self.run(
            f"(r => [r.x + r.width / 2, r.y + r.height / 2])(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """One key, by its name in JavaScript: Tab, Enter, ArrowDown."""
        codes = {"Tab": 9, "Enter": 13, "ArrowDown": 40, "ArrowUp": 38, "ArrowLeft": 37, "ArrowRight": 39}
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key], **(text if kind == "keyDown" else {}))

    def call(self, method: str, **parameters):
        """One command of the protocol and its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None and not method.startswith("Target."):
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + ANSWER_S
        while True:
            answer = self._receive(end)
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _receive(self, end: float) -> dict:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"the browser did not answer within {ANSWER_S} s"
            data = os.read(self._in, 1 << 20)
            assert data, "the browser ended"
            self._buffer += data
        row, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(row)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method: str | None, told: dict) -> None:
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.consoleAPICalled":
            self.said.append(f"console.{told['type']}: {told['args']}")
        elif method == "Runtime.exceptionThrown":
            self.said.append(f"exception: {told['exceptionDetails'].get('exception', told['exceptionDetails'])}")
        elif method == "Log.entryAdded":
            self.said.append(f"{told['entry']['level']}: {told['entry']['text']}")

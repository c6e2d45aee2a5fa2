"""Headless Chromium, driven over the DevTools protocol through a pair of pipes.

Runs on: the test's thread.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

LIMIT = 60.0
"""Seconds for one answer of the browser; it shares two cores with a broker."""

WAIT = """new Promise((resolve, reject) => {
  const holds = () => (%s);
  const look = () => { if (holds()) { resolve(holds()); watcher.disconnect(); } };
  const watcher = new MutationObserver(look);
  const all = {subtree: true, childList: true, attributes: true, characterData: true};
  watcher.observe(document, all);
  setTimeout(() => reject(new Error(document.body.innerText)), %d);
  look();
})"""


class Browser:
    """A browser with one tab.

    :param directory: for its profile
    """

    def __init__(self, directory: Path) -> None:
        program = shutil.which("chromium")
        assert program is not None, "apt-get install chromium"
        commands, self._to = os.pipe()
        self._from, answers = os.pipe()
        argv = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        argv += ["--remote-debugging-pipe", f"--user-data-dir={directory}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{commands} 4>&{answers}', "bash", *argv],
            stderr=subprocess.DEVNULL,
            pass_fds=(commands, answers),
            start_new_session=True,
        )
        os.close(commands)
        os.close(answers)
        self._numbers = itertools.count(1)
        self._read = b""
        self._session: str | None = None
        self._loads = 0
        self.complaints: list[str] = []

    def __enter__(self) -> Browser:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, 9)
        self._process.wait(LIMIT)
        os.close(self._to)
        os.close(self._from)

    # --- what a test does ----------------------------------------------------------------------

    def open(self, url: str) -> None:
        """Load a page."""
        loads, deadline = self._loads, time.monotonic() + LIMIT
        self.call("Page.navigate", url=url)
        while self._loads == loads:
            self._hear(self._next(deadline))

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        result = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, expression: str, timeout: float = LIMIT / 2) -> Any:
        """Wait until a JavaScript expression about the document holds, and return its value."""
        return self.evaluate(WAIT % (expression, round(1000 * timeout)))

    def text(self, selector: str) -> str:
        """Return an element's text."""
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText"))

    def look_like(self, width: int, height: int, *, dark: bool = False) -> None:
        """Take the size and colours of a screen; a narrow one is a phone's."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def javascript(self, *, allowed: bool) -> None:
        """Run pages' scripts from now on, or run none."""
        self.call("Emulation.setScriptExecutionDisabled", value=not allowed)

    def screenshot(self, path: Path) -> None:
        """Write what is seen as PNG, the whole page in its length."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    # --- the protocol --------------------------------------------------------------------------

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol and give its result."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + LIMIT
        while True:
            answer = self._next(deadline)
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return dict(answer["result"])
            self._hear(answer)

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._from], [], [], deadline - time.monotonic())
            assert ready, "the browser does not answer"
            piece = os.read(self._from, 1 << 20)
            assert piece, "the browser has ended"
            self._read += piece
        message, _, self._read = self._read.partition(b"\0")
        return dict(json.loads(message))

    def _hear(self, event: dict[str, Any]) -> None:
        """Note that a page was loaded, and what its author would see in the console."""
        method, params = event.get("method"), event.get("params", {})
        if method == "Page.loadEventFired":
            self._loads += 1
        elif method == "Log.entryAdded":
            self.complaints.append(params["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(params["exceptionDetails"]["text"])

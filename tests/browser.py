"""Headless Chromium for tests and pictures, driven over a pipe by its own protocol (CDP): no driver, no port.

with Browser(width=390, height=844) as page:
    page.open(file.as_uri())
    assert page.ask("document.querySelectorAll('.dot').length") == 16
    page.wait("document.title === 'done'")
    page.picture(Path("page.png"))
"""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import pytest

from allocators.core.errors import StudyError

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 60.0  # seconds that an answer may take on a busy machine


def program() -> str | None:
    """The browser's program; None where none is installed."""
    return next((path for name in PROGRAMS if (path := shutil.which(name))), None)


needs_browser = pytest.mark.skipif(program() is None, reason="no Chromium is on the path")


class Browser:
    """One page of a new browser. Raises StudyError where no Chromium is installed.

    errors   exceptions of the page's scripts and what its console calls an error, since the last `open`
    """

    def __init__(self, *, width: int = 1240, height: int = 900, dark: bool = False) -> None:
        if (path := program()) is None:
            raise StudyError("no Chromium is on the path: apt-get install chromium")
        self._path, self._size, self._dark = path, (width, height), dark
        self._numbers = itertools.count(1)
        self._rest = b""
        self.errors: list[str] = []

    def __enter__(self) -> Self:
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (there, self._write), (self._read, back) = os.pipe(), os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (there, back)]  # clear of 3 and 4
        words = [self._path, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        words += ["--disable-dev-shm-usage", "--disable-extensions", "--disable-background-networking"]
        words += [f"--user-data-dir={self._profile.name}", "--remote-debugging-pipe", "about:blank"]
        nowhere = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in range(3)]
        pipes = [(os.POSIX_SPAWN_DUP2, end, number) for number, end in enumerate(ends, start=3)]
        self._process = os.posix_spawn(self._path, words, os.environ, file_actions=[*nowhere, *pipes])
        for end in (there, back, *ends):
            os.close(end)
        self._session: str | None = None
        pages = [one for one in self._call("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        self._session = self._call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")
        width, height = self._size
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if self._dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        os.close(self._read)
        os.close(self._write)
        self._profile.cleanup()

    def open(self, address: str) -> None:
        """Goes to an address and waits until its page is loaded."""
        self._call("Page.navigate", url="about:blank")  # an address that differs after its # is another page, too
        self.wait("location.href === 'about:blank'")
        self.errors.clear()
        self.ask("window.before = true")
        failed = self._call("Page.navigate", url=address).get("errorText")
        assert not failed, f"{address}: {failed}"
        self.wait("!window.before && document.readyState === 'complete'")

    def ask(self, expression: str) -> Any:
        """The value of an expression in the page, a promise's too. Raises AssertionError where it throws."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"].get("exception", {}).get("description", str(answer)))
        return answer["result"].get("value")

    def wait(self, condition: str, *, seconds: float = PATIENCE) -> Any:
        """The value of an expression as soon as it is true. Raises AssertionError where it never is."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                if value := self.ask(condition):
                    return value
            except AssertionError:  # of a page that is going away
                pass
            time.sleep(0.05)
        raise AssertionError(f"in {seconds} s it was never true that {condition}; errors: {self.errors}")

    def picture(self, to: Path) -> None:
        """What the window shows, as PNG."""
        to.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        call = {"id": number, "method": method, "params": params}
        session = {"sessionId": self._session} if getattr(self, "_session", None) else {}
        os.write(self._write, json.dumps(call | session).encode() + b"\0")
        until = time.monotonic() + PATIENCE
        while True:
            message = self._next(until)
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                result: dict[str, Any] = message["result"]
                return result
            self._note(message)

    def _next(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(until - time.monotonic(), 0))
            got = os.read(self._read, 1 << 16) if ready else b""
            assert got, "the browser does not answer"
            self._rest += got
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description", details["text"]))
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

"""A headless Chromium, driven over a pipe by the DevTools protocol: what pages look like where nobody looks."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find() -> str | None:
    """The browser's path; None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One browser with one page; a context manager.

    Attributes:
        said: what the page wrote to its console, and every error, since `open`.
        requested: the addresses that it asked for since `open`.
    """

    def __init__(self, home: Path) -> None:
        """``home``: an empty directory for the browser's own files."""
        self._count = 0
        self._unread = b""
        self.said: list[str] = []
        self.requested: list[str] = []
        commands, answers = home / "commands", home / "answers"
        os.mkfifo(commands)
        os.mkfifo(answers)
        # The browser reads commands from descriptor 3 and answers on 4.
        connect = 'exec "$@" 3<"$COMMANDS" 4>"$ANSWERS"'
        self._process = subprocess.Popen(
            [
                "/bin/sh", "-c", connect, "sh", find(), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
                "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
                "--remote-debugging-pipe", f"--user-data-dir={home / 'profile'}", "about:blank",
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=os.environ | {"HOME": str(home), "COMMANDS": str(commands), "ANSWERS": str(answers)},
        )  # fmt: skip
        self._commands, self._answers = commands.open("wb", buffering=0), answers.open("rb", buffering=0)
        self._session: str | None = None
        targets = self._call("Target.getTargets")["targetInfos"]
        (page,) = [target["targetId"] for target in targets if target["type"] == "page"]
        self._session = self._call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_) -> None:
        self._session = None
        self._call("Browser.close")
        self._process.wait()
        self._commands.close()
        self._answers.close()

    def open(self, address: str, width: int, dark: bool = False) -> None:
        """Shows a page in a window this many CSS pixels wide, and waits until it has loaded."""
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self.said.clear()
        self.requested.clear()
        self._call("Page.navigate", url=address)
        while self._receive().get("method") != "Page.loadEventFired":
            pass
        self.evaluate(
            "Promise.all([...document.images].map(image => image.decode().catch(() => null))).then(() => true)"
        )

    def evaluate(self, expression: str) -> object:
        """The value of JavaScript in the page; a promise's own."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def screenshot(self, path: Path, whole: bool = True) -> Path:
        """A PNG of the page, or of what the window shows of it."""
        answer = self._call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))
        return path

    def _call(self, method: str, **parameters: object) -> dict:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        self._commands.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _receive(self) -> dict:
        parts = [self._unread]
        while b"\0" not in parts[-1]:
            parts.append(self._answers.read(1 << 16))
            if not parts[-1]:
                raise RuntimeError(f"the browser ended with status {self._process.wait()}")
        text, _, self._unread = b"".join(parts).partition(b"\0")
        message = json.loads(text)
        method, facts = message.get("method"), message.get("params", {})
        if method == "Runtime.consoleAPICalled":
            self.said.append(" ".join(str(item.get("value")) for item in facts["args"]))
        elif method == "Runtime.exceptionThrown":
            self.said.append(facts["exceptionDetails"]["text"])
        elif method == "Log.entryAdded":
            self.said.append(facts["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requested.append(facts["request"]["url"])
        return message

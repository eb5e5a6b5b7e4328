"""A headless Chromium on one page, driven by the DevTools protocol: real mouse and keyboard, console and network."""

import asyncio
import base64
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-port=0",
    "--window-size=1300,1000", "--hide-scrollbars",
)  # fmt: skip


class Browser:
    """One tab. errors: console errors, exceptions and failed loads; requests: every address it asked for."""

    def __init__(self, folder: Path):
        """folder: empty, for its profile. Skips the test where there is no Chromium."""
        program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if program is None:
            pytest.skip("no Chromium here: the page is not opened (apt-get install chromium)")
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._count = 0
        self._loop = asyncio.new_event_loop()
        self._process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        port, deadline = folder / "DevToolsActivePort", time.monotonic() + 60
        while not (port.exists() and port.read_text().count("\n")):
            assert time.monotonic() < deadline, "Chromium did not start"
            assert self._process.poll() is None, "Chromium ended at once"
            time.sleep(0.1)
        self._run(self._connect(int(port.read_text().split()[0])))

    def _run(self, work: Any) -> Any:
        return self._loop.run_until_complete(asyncio.wait_for(work, 60))

    async def _connect(self, port: int) -> None:
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json") as answer:
            (page,) = [target for target in await answer.json() if target["type"] == "page"]
        self._socket = await self._session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self._call(f"{domain}.enable")

    async def _call(self, method: str, until: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command; return its result, after the event `until` where one is named."""
        self._count += 1
        number, result = self._count, None
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while result is None or until is not None:
            message = await self._socket.receive_json()
            if message.get("id") == number:
                assert "error" not in message, message
                result = message["result"]
            elif message.get("method") == until:
                until = None
            self._note(message)
        return result

    def _note(self, message: dict[str, Any]) -> None:
        parameters = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.errors.append(str(parameters["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "warning"):
                self.errors.append(str(parameters["args"]))
            case "Log.entryAdded" if parameters["entry"]["level"] in ("error", "warning"):
                self.errors.append(parameters["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])

    def open(self, path: Path) -> None:
        """Open a file and wait until it is loaded."""
        self._run(self._call("Page.navigate", until="Page.loadEventFired", url=path.resolve().as_uri()))

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives."""
        found = self._run(self._call("Runtime.evaluate", expression=expression, returnByValue=True))
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, expression: str) -> Any:
        """What an expression gives once it gives anything but nothing (some events come a moment after a click)."""
        deadline = time.monotonic() + 30
        while not (found := self.value(expression)):
            assert time.monotonic() < deadline, f"still nothing: {expression}"
            time.sleep(0.05)
        return found

    def place(self, selector: str) -> tuple[float, float]:
        """The middle of an element, after scrolling to it."""
        box = f"document.querySelector({json.dumps(selector)})"
        self.value(f"{box}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        return tuple(self.value(f"(b => [b.left + b.width / 2, b.top + b.height / 2])({box}.getBoundingClientRect())"))

    def move(self, x: float, y: float) -> None:
        """Move the mouse."""
        self._run(self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y))

    def click(self, selector: str) -> None:
        """Click the middle of an element with the mouse."""
        x, y = self.place(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self._run(self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1))

    def choose(self, selector: str, value: str) -> None:
        """Choose an option of a select, as the list that opens would (headless Chromium draws none)."""
        event = "new Event('change', {bubbles: true})"
        self.value(f"(s => {{s.value = {value!r}; s.dispatchEvent({event})}})(document.querySelector({selector!r}))")

    def screenshot(self) -> bytes:
        """A PNG of what the window shows."""
        return base64.b64decode(self._run(self._call("Page.captureScreenshot", format="png"))["data"])

    def close(self) -> None:
        """End it."""
        self._run(self._session.close())
        self._loop.close()
        self._process.terminate()
        self._process.wait(30)

"""A real headless Chromium, driven over its DevTools protocol: just what the console's tests need of it."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import websockets

_SCRIPT = Path(__file__).parents[2] / "deploy" / "browser" / "chromium.sh"
_FLAGS = (
    "--headless=shell",
    "--no-sandbox",  # containers have no user namespaces; it opens nothing but our own page
    "--no-zygote",
    "--in-process-gpu",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--mute-audio",
    "--font-render-hinting=none",
    "--no-proxy-server",
    "--remote-debugging-port=0",
)
_START_S = 60.0
_CALL_S = 30.0


class Page:
    """One tab. `problems`: what the browser complained about: errors, refused policies, failed requests."""

    def __init__(self, socket: websockets.ClientConnection) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.problems: list[str] = []

    async def listen(self) -> None:
        with suppress(websockets.ConnectionClosed):
            async for message in self._socket:
                told = json.loads(message)
                if told.get("id") in self._waiting:
                    self._waiting.pop(told["id"]).set_result(told)
                elif told.get("method") == "Runtime.exceptionThrown":
                    details = told["params"]["exceptionDetails"]
                    self.problems.append(details.get("exception", {}).get("description") or details["text"])
                elif told.get("method") == "Log.entryAdded" and told["params"]["entry"]["level"] == "error":
                    self.problems.append(told["params"]["entry"]["text"])

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        await self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        async with asyncio.timeout(_CALL_S):
            told = await answer
        assert "error" not in told, f"{method}: {told.get('error')}"
        result: dict[str, Any] = told["result"]
        return result

    async def open(self, url: str) -> None:
        await self.call("Page.navigate", url=url)

    async def run(self, script: str) -> Any:
        """What a JavaScript expression gives; promises are awaited."""
        done = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"].get("exception", done)
        return done["result"].get("value")

    async def until(self, script: str, within_s: float = 20.0) -> Any:
        """Wait until an expression is true; what it gives then (an element is an empty object)."""
        try:
            async with asyncio.timeout(within_s):
                while (value := await self.run(script)) in (None, False, 0, ""):
                    await asyncio.sleep(0.05)
        except TimeoutError:
            shown = await self.run("document.body.innerText")
            raise AssertionError(f"not in {within_s:g} s: {script}\nthe page: {shown}\n{self.problems}") from None
        return value

    async def click(self, selector: str) -> None:
        """A real click in the middle of what the selector finds, once it stands still and nothing lies over it."""
        script = (
            f"(async () => {{ const e = document.querySelector({json.dumps(selector)});"
            " if (!e) return null; e.scrollIntoView({block: 'nearest'});"
            " const middle = () => { const b = e.getBoundingClientRect();"
            "   return [b.x + b.width / 2, b.y + b.height / 2]; };"
            " const before = middle(); await new Promise(r => setTimeout(r, 50)); const now = middle();"
            " if (before[0] !== now[0] || before[1] !== now[1]) return null;"
            " const hit = document.elementFromPoint(...now); return hit && e.contains(hit) ? now : null; })()"
        )
        x, y = await self.until(script)
        await self.click_at(x, y)

    async def click_at(self, x: float, y: float) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def write(self, text: str) -> None:
        await self.call("Input.insertText", text=text)

    async def press(self, key: str, code: int, *, text: str = "") -> None:
        said = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        await self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **said)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **said)

    async def choose_files(self, selector: str, *paths: Path) -> None:
        document = await self.call("DOM.getDocument")
        found = await self.call("DOM.querySelector", nodeId=document["root"]["nodeId"], selector=selector)
        await self.call("DOM.setFileInputFiles", nodeId=found["nodeId"], files=[str(path) for path in paths])

    async def look(self, *, width: int = 1280, height: int = 800, dark: bool = False) -> None:
        """Be of this size and in this mode."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])

    async def picture(self) -> bytes:
        """What is seen, as PNG."""
        return base64.b64decode((await self.call("Page.captureScreenshot", format="png"))["data"])


class Browser:
    def __init__(self, url: str) -> None:
        self._url = url

    @asynccontextmanager
    async def page(self) -> AsyncIterator[Page]:
        """A tab of its own, which shares no storage with others."""
        async with websockets.connect(self._url, max_size=None, proxy=None) as socket:
            root = Page(socket)
            listening = asyncio.create_task(root.listen())
            context = (await root.call("Target.createBrowserContext"))["browserContextId"]
            target = (await root.call("Target.createTarget", url="about:blank", browserContextId=context))["targetId"]
            address = self._url.partition("/devtools/")[0] + f"/devtools/page/{target}"
            try:
                async with websockets.connect(address, max_size=None, proxy=None) as own:
                    page = Page(own)
                    hearing = asyncio.create_task(page.listen())
                    for domain in ("Page", "Runtime", "Log", "DOM"):
                        await page.call(f"{domain}.enable")
                    await page.look()
                    yield page
                await hearing
            finally:
                await root.call("Target.disposeBrowserContext", browserContextId=context)
                await socket.close()
                await listening


@asynccontextmanager
async def chromium(folder: Path) -> AsyncIterator[Browser]:
    """Started, and killed at the end with all that it has started."""
    program = Path(subprocess.run([_SCRIPT, sys.executable], check=True, capture_output=True, text=True).stdout.strip())
    home = program.parent
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(home / "lib"),
        "FONTCONFIG_FILE": str(home / "fonts.xml"),
        "HOME": str(folder),
    }
    with (folder / "chromium.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            str(program),
            *_FLAGS,
            f"--user-data-dir={folder / 'profile'}",
            "about:blank",
            stdout=asyncio.subprocess.DEVNULL,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    port_file = folder / "profile" / "DevToolsActivePort"
    try:
        async with asyncio.timeout(_START_S):
            while not (port_file.exists() and port_file.read_text().count("\n")):
                assert process.returncode is None, (folder / "chromium.log").read_text()
                await asyncio.sleep(0.05)
        port, path = port_file.read_text().split("\n")[:2]
        yield Browser(f"ws://127.0.0.1:{port}{path}")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        await process.wait()

"""A headless Chromium, driven over WebDriver by chromedriver: no more of the protocol than the tests need."""

import base64
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key by which WebDriver names an element
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
]  # fmt: skip
PATIENCE = 60.0  # seconds


class Browser:
    """One window. Use it as a context manager.

    Args:
        size: of the window, pixels.
        scheme: "light" or "dark": what the page is told the reader prefers.
        phone: width of an emulated phone, CSS pixels, in place of `size`.
    """

    def __init__(self, size: tuple[int, int] = (1100, 900), scheme: str = "light", phone: int | None = None):
        self.driver = subprocess.Popen(
            [str(DRIVER), "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.driver.stdout
        said = next(line for line in self.driver.stdout if "started successfully on port" in line)
        self.address = "http://127.0.0.1:" + re.search(r"port (\d+)", said)[1]
        options: dict[str, Any] = {"args": [*FLAGS, f"--window-size={size[0]},{size[1]}"], "binary": CHROMIUM}
        if phone:
            options["mobileEmulation"] = {"deviceMetrics": {"width": phone, "height": 844, "pixelRatio": 2.0}}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        self.session = ""
        made = self._ask("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        self.session = f"/{made['sessionId']}"
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.devtools("Emulation.setEmulatedMedia", features=features)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._ask("DELETE", "")
        finally:
            self.driver.terminate()
            self.driver.wait()

    def open(self, address: str) -> None:
        """Open a report and wait until all its figures are drawn."""
        self._ask("POST", "/url", {"url": address})
        self.wait_for("return document.documentElement.dataset.ready")

    def run(self, script: str) -> Any:
        """Run JavaScript in the page; what it returns comes back."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": []})

    def wait_for(self, script: str) -> Any:
        """Run JavaScript until it returns something true."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if (got := self.run(script)) not in (None, False, "", 0):
                return got
            time.sleep(0.05)
        raise TimeoutError(f"{script!r} stayed untrue for {PATIENCE} s")

    def point_at(self, css: str, number: int = 0, *, click: bool = False) -> None:
        """Move the pointer onto the number-th element of a selector, and click if asked."""
        script = f"const e = document.querySelectorAll({json.dumps(css)})[{number}]; "
        place = self.run(f"{script} e.scrollIntoView({{block: 'center'}}); return e;")
        actions: list[dict[str, Any]] = [{"type": "pointerMove", "origin": {ELEMENT: place[ELEMENT]}, "x": 0, "y": 0}]
        if click:
            actions += [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        self._ask("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": actions}]})

    def requests(self) -> set[str]:
        """Addresses that the page asked for since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self._log("performance")]
        return {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}

    def console(self) -> list[str]:
        """What stands in the console since the last call."""
        return [entry["message"] for entry in self._log("browser")]

    def screenshot(self, height: int) -> bytes:
        """Take a picture of the page's top, as PNG."""
        clip = {"x": 0, "y": 0, "width": self.run("return innerWidth"), "height": height, "scale": 1}
        taken = self.devtools("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(taken["data"])

    def printed(self) -> bytes:
        """Print the page to PDF."""
        return base64.b64decode(self._ask("POST", "/print", {"background": True}))

    def devtools(self, command: str, **params: Any) -> Any:
        """Call a command of Chromium's own protocol."""
        return self._ask("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def _log(self, kind: str) -> list[dict[str, Any]]:
        return self._ask("POST", "/se/log", {"type": kind})

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        address = f"{self.address}/session{self.session}{path}"
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(address, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(asked, timeout=PATIENCE) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()[:600]) from None

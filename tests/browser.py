"""A real browser for tests: headless Chromium, spoken to over its debugging pipe with the standard library alone."""

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "about:blank",
)


def find_chromium():
    """The binary: $CALIG_CHROMIUM, else what is installed; None where there is none."""
    return os.environ.get("CALIG_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


CHROMIUM = find_chromium()
in_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium found: install the package chromium, or name a binary in $CALIG_CHROMIUM"
)


def texts(page, selector):
    """What the nodes of a selector say."""
    return page.js(f"[...document.querySelectorAll({json.dumps(selector)})].map((node) => node.textContent)")


class Page:
    """One tab of a browser of its own.

    Attributes:
        errors: What was thrown, rejected, or written to the console as an error or a warning.
        requests: Addresses that were asked for.
    """

    def __init__(self, binary, timeout=60):
        self.errors, self.requests, self.timeout = [], [], timeout
        self._count, self._buffer, self._session = 0, b"", None
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        ends = [*os.pipe(), *os.pipe()]
        # Out of the way of 3 and 4, where the browser reads commands and writes answers.
        for_child = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (ends[0], ends[3])]
        self._writer, self._reader = ends[1], ends[2]
        os.close(ends[0])
        os.close(ends[3])

        def connect():
            os.dup2(for_child[0], 3)
            os.dup2(for_child[1], 4)

        self._process = subprocess.Popen(
            [binary, f"--user-data-dir={self._profile.name}", *FLAGS],
            preexec_fn=connect,
            pass_fds=(3, 4),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for end in for_child:
            os.close(end)
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._writer)
        os.close(self._reader)
        self._profile.cleanup()

    def send(self, method, **parameters):
        """One command of the DevTools protocol, and its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writer, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._note(answer)

    def _receive(self):
        end = time.monotonic() + self.timeout
        while b"\0" not in self._buffer:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._reader], [], [], left)[0]:
                raise TimeoutError(f"Chromium did not answer within {self.timeout} s")
            chunk = os.read(self._reader, 1 << 20)
            if not chunk:
                raise RuntimeError(f"Chromium ended with {self._process.wait()}")
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event):
        kind, data = event.get("method"), event.get("params", {})
        if kind == "Runtime.exceptionThrown":
            details = data["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif kind == "Runtime.consoleAPICalled" and data["type"] in ("error", "warning", "assert"):
            self.errors.append(str([item.get("value", item.get("description")) for item in data["args"]]))
        elif kind == "Log.entryAdded" and data["entry"]["level"] in ("error", "warning"):
            self.errors.append(data["entry"]["text"])
        elif kind == "Network.requestWillBeSent":
            self.requests.append(data["request"]["url"])

    def open(self, address, width=1280, height=900):
        """Load a page in a window of this size and wait until it has loaded."""
        self.resize(width, height)
        self.send("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def resize(self, width, height):
        """Set the size of the window."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def js(self, expression):
        """The value of an expression in the page."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, expression):
        """Wait until an expression is true."""
        end = time.monotonic() + self.timeout
        while not self.js(expression):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.05)

    def place(self, selector):
        """The middle of an element, scrolled into sight."""
        found = self.js(
            f"(() => {{ const node = document.querySelector({json.dumps(selector)}); if (!node) return null;"
            "node.scrollIntoView({block: 'center'}); const box = node.getBoundingClientRect();"
            "return box.width && box.height ? [box.x + box.width / 2, box.y + box.height / 2] : null; })()"
        )
        assert found, f"nothing to see at {selector}"
        return found

    def hover(self, selector):
        """Move the mouse over an element."""
        x, y = self.place(selector)
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector):
        """Click on an element as a mouse does: what lies above it gets the click."""
        x, y = self.place(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key):
        """Press a key: a name such as ArrowLeft, Tab, Home, or a character."""
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        code = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, "Tab": 9, "Enter": 13, "Escape": 27}.get(key)
        codes = {"windowsVirtualKeyCode": code} if code else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, **codes, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, **codes)

    def type(self, selector, text):
        """Replace what a field holds, as typing does."""
        self.click(selector)
        self.js(f"document.querySelector({json.dumps(selector)}).select()")
        self.send("Input.insertText", text=text) if text else self.press("Delete")

    def choose(self, selector, value):
        """Choose an option of a select element."""
        self.js(
            f"(() => {{ const node = document.querySelector({json.dumps(selector)}); node.value = {json.dumps(value)};"
            "node.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )

    def picture(self, path, whole=True):
        """Save what is seen as PNG."""
        import base64

        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

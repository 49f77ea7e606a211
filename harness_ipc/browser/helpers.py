"""The helpers: what a process asks of the page. Each is one or a few requests to the daemon over one kept connection.

The daemon is started by the first helper that needs it. A process stays in the tab that it used first, or that it has switched
to since, whatever others do. Every `timeout` is in seconds, for each request of the helper; what runs out is `BrowserTimeout`
or `DaemonTimeout`, both `TimeoutError`.
"""

from __future__ import annotations

import binascii
import contextlib
import os
import sys
import threading
import time

from harness_ipc import Client, ClientClosed, ConnectionLost, DaemonNotRunning, connect_daemon, escape_control

from . import INTERNAL, LONGEST, MAX_MESSAGE, MAX_TEXT, check_extra, daemon_name, is_ours, not_ours
from ._files import replace_file
from .errors import (
    SERVER_ERROR,
    BrowserError,
    BrowserLost,
    BrowserNotFound,
    BrowserTimeout,
    CDPError,
    DialogOpen,
    JavaScriptError,
    TabClosed,
    from_reply,
)
from .own_imports import without_program_directory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

__all__ = [
    "BrowserError",
    "BrowserLost",
    "BrowserNotFound",
    "BrowserTimeout",
    "CDPError",
    "DialogOpen",
    "JavaScriptError",
    "TabClosed",
    "capture_screenshot",
    "cdp",
    "click_at_xy",
    "close_tab",
    "current_tab",
    "drain_events",
    "ensure_real_tab",
    "goto_url",
    "handle_dialog",
    "iframe_target",
    "js",
    "list_tabs",
    "new_tab",
    "page_info",
    "press_key",
    "scroll",
    "switch_tab",
    "type_text",
    "wait",
    "wait_for_load",
]

# Seconds for a request: a page may take its time.
TIMEOUT = 30.0
# Seconds for a page to load, as browser-harness has it.
LOAD_TIMEOUT = 15.0
# Seconds for the daemon to start, with a browser that starts or asks its user.
START_TIMEOUT = 60.0
# Seconds that the daemon gets beyond a timeout, which it keeps itself and knows more about.
_GRACE = 2.0
# JSON-RPC's code of what Chrome says of code that ran for longer than it was given.
_INTERNAL_ERROR = -32603
# The bits of CDP's `modifiers` that make a key type nothing.
_ALT, _CONTROL, _META = 1, 2, 4
# Key to (windowsVirtualKeyCode, text that it types). The code of each is its name.
_KEYS = {
    "Enter": (13, "\r"),
    "Tab": (9, ""),
    "Backspace": (8, ""),
    "Escape": (27, ""),
    "Delete": (46, ""),
    "Insert": (45, ""),
    "ArrowLeft": (37, ""),
    "ArrowUp": (38, ""),
    "ArrowRight": (39, ""),
    "ArrowDown": (40, ""),
    "Home": (36, ""),
    "End": (35, ""),
    "PageUp": (33, ""),
    "PageDown": (34, ""),
    **{f"F{number}": (111 + number, "") for number in range(1, 13)},
    "Space": (32, " "),
}
# On macOS the browser leaves these to the menu, which has to be told (Input.dispatchKeyEvent's `commands`).
_COMMANDS = {"a": "selectAll", "c": "copy", "v": "paste", "x": "cut", "z": "undo"}

_PAGE = (
    "({url: location.href, title: document.title, w: innerWidth, h: innerHeight, sx: scrollX, sy: scrollY, "
    "pw: document.documentElement?.scrollWidth ?? 0, ph: document.documentElement?.scrollHeight ?? 0})"
)
_LOADED = "document.readyState === 'complete' || new Promise(done => addEventListener('load', () => done(true), {once: true}))"

_lock = threading.Lock()
_client: Client | None = None
_process = 0
# The session that this process stays with.
_session: str | None = None


def connect(*, timeout: float = START_TIMEOUT) -> Client:
    """Return this process's connection to the browser's daemon, which is started if it does not run.

    Raises `StartFailed` (of harness_ipc) with the reason, `IncompatibleDaemon` if it is another program's, and what
    `ensure_daemon` does.
    """
    global _client, _process, _session
    with _lock:
        if _client is not None and _process == os.getpid() and _client.name == daemon_name():
            return _client
        name = daemon_name()
        with without_program_directory():
            try:
                client = connect_daemon(name, max_message=MAX_MESSAGE)
            except (DaemonNotRunning, ConnectionLost):
                # Lost, if one is just dying: nothing was sent yet.
                start_daemon(name, timeout=timeout)
                client = connect_daemon(name, max_message=MAX_MESSAGE)
        if not is_ours(client.app_version):
            client.close()
            raise not_ours(name)
        _client, _process, _session = client, os.getpid(), None
        return client


def start_daemon(name: str, *, timeout: float = START_TIMEOUT) -> None:
    """Be sure that the browser's daemon `name` runs. Raises what `harness_ipc.ensure_daemon` does."""
    # Not needed by a process that finds the daemon.
    from harness_ipc import ensure_daemon

    check_extra()
    # -P: `python -m` would import from the current directory first.
    ensure_daemon(name, [sys.executable, "-P", "-m", "harness_ipc.browser.daemon", name], timeout=timeout)


def disconnect() -> None:
    """Close this process's connection, if there is one: the next helper opens another."""
    global _client, _session
    with _lock:
        client, _client, _session = _client, None, None
    if client is not None and _process == os.getpid():
        client.close()


def _send(message: dict[str, Any], *, timeout: float = TIMEOUT) -> dict[str, Any]:
    """Ask the daemon one thing, and return its reply: ``{"method", "params", "session_id"}``, or ``{"meta": verb}``.

    A request that names no session is for the tab that this process is in. Raises what `errors` lists for a reply with an
    error; `ConnectionLost` if the daemon goes away, and then nothing is repeated: the next call finds or starts another.
    """
    global _session
    client = connect()
    request = {"timeout": min(timeout, LONGEST), **message}
    ours = not message.get("session_id")
    if ours and _session is not None and message.get("meta") != "set_session":
        request["session_id"] = _session
    try:
        reply = client.request(request, timeout=timeout + _GRACE)
    except (ClientClosed, ConnectionLost, DaemonNotRunning):
        disconnect()
        raise
    if "error" in reply:
        error = from_reply(reply["error"])
        if isinstance(error, TabClosed) and ours:
            # Said once, so that nothing goes to another tab unseen. From now on, the daemon's tab is ours.
            _session = None
        raise error
    if ours and reply.get("session_id"):
        # Ours, or the one that took its place.
        _session = reply["session_id"]
    return reply


def cdp(method: str, session_id: str | None = None, *, timeout: float = TIMEOUT, **params: Any) -> dict[str, Any]:
    """Call the method of the Chrome DevTools Protocol, and return its result.

    ```python
    cdp("Page.navigate", url="https://example.org")
    cdp("DOM.getDocument", depth=-1)
    ```

    `session_id` is another session than that of this process's tab. (A parameter that is itself called ``timeout`` goes by
    ``_send({"method": …, "params": …})``.) Raises `CDPError`, `DialogOpen`, `TabClosed`, `BrowserTimeout` or `BrowserLost`.
    """
    result: dict[str, Any] = _send({"method": method, "params": params, "session_id": session_id}, timeout=timeout)["result"]
    return result


# The page.


def page_info(*, timeout: float = TIMEOUT) -> dict[str, Any]:
    """Return what the page is: url, title, viewport (w, h), scroll position (sx, sy) and page size (pw, ph), in CSS pixels.

    If a dialog holds the page, return ``{"dialog": {"type", "message", …}}`` instead: answer it with `handle_dialog`.
    """
    try:
        return dict(js(_PAGE, timeout=timeout))
    except DialogOpen as error:
        return {"dialog": error.dialog}


def goto_url(url: str, *, timeout: float = TIMEOUT) -> dict[str, Any]:
    """Navigate the tab, and return CDP's result once the new document is there; `wait_for_load` waits for the rest of it.

    Raises `CDPError` with the browser's reason (``net::ERR_…``) if the page can't be had.
    """
    try:
        result = cdp("Page.navigate", url=url, timeout=timeout)
    except BrowserTimeout:
        # Chrome keeps all else of the page waiting until the navigation ends.
        _send_if_there("Page.stopLoading", cdp, timeout=timeout)
        raise
    # What is downloaded instead of shown is "aborted" as a page.
    if result.get("errorText") and not result.get("isDownload"):
        raise CDPError(f"{url} can't be loaded: {result['errorText']}")
    # Answered once the document has taken its place: until then the tab has no address.
    _send_if_there("Runtime.evaluate", cdp, expression="0", timeout=timeout)
    return result


def wait_for_load(timeout: float = LOAD_TIMEOUT) -> bool:
    """Wait until the page has loaded, with its images and frames. Return False if it has not after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        try:
            return bool(js(_LOADED, timeout=left))
        except BrowserTimeout:
            return False
        except CDPError as error:
            # The document that was asked has made room for the next one.
            if error.code != SERVER_ERROR or error.data.get("crashed"):
                raise
    return False


def js(expression: str, target_id: str | None = None, *, timeout: float = TIMEOUT) -> Any:
    """Evaluate JavaScript in the page, or in the iframe `target_id` (see `iframe_target`), and return its value.

    ```python
    js("document.title")
    js("await fetch('/api').then(reply => reply.json())")
    js("const a = 6; return a * 7")
    ```

    A promise is waited for. undefined and null are None; NaN and the infinities floats; a BigInt an int; whatever else has to
    be what JSON can carry (inside an object or an array, NaN is None). Code with a top-level ``await`` or ``return`` is the
    body of a function. Code that goes on after `timeout` without waiting for anything is ended.

    Raises `JavaScriptError` for what the code throws, `CDPError` for a value that can't be carried.
    """
    if target_id is None:
        return _evaluate(expression, None, timeout)
    number = cdp("Target.attachToTarget", targetId=target_id, flatten=True, timeout=timeout)["sessionId"]
    try:
        return _evaluate(expression, number, timeout)
    finally:
        _send_if_there("Target.detachFromTarget", cdp, sessionId=number, timeout=timeout)


def _evaluate(expression: str, session: str | None, timeout: float) -> Any:
    def call(method: str, **params: Any) -> dict[str, Any]:
        result: dict[str, Any] = _send({"method": method, "params": params, "session_id": session}, timeout=timeout)["result"]
        return result

    # Milliseconds. A page that computes for ever would answer nothing any more.
    options = {"awaitPromise": True, "userGesture": True, "timeout": min(timeout * 1000, 2**31 - 1)}
    try:
        if "await" in expression:
            # Only replMode takes it for what it is, whatever stands behind it, and then gives no value but a reference.
            result = call("Runtime.evaluate", expression=expression, replMode=True, **options)
            result = _dereference(call, result)
        else:
            result = call("Runtime.evaluate", expression=expression, returnByValue=True, **options)
        if _is_body(result):
            body = f"(async () => {{{expression}\n}})()"
            result = call("Runtime.evaluate", expression=body, returnByValue=True, **options)
    except CDPError as error:
        if error.code == _INTERNAL_ERROR:
            raise BrowserTimeout(f"the code ran for more than {timeout:g} s, and was ended") from None
        raise
    if (details := result.get("exceptionDetails")) is not None:
        text = escape_control(_thrown(details), allow="\n\t")
        raise JavaScriptError(text, line=details.get("lineNumber"), column=details.get("columnNumber"))
    value = result["result"]
    return _unserializable(value["unserializableValue"]) if "unserializableValue" in value else value.get("value")


def _dereference(call: Callable[..., dict[str, Any]], result: dict[str, Any]) -> dict[str, Any]:
    """Return the result with the value itself, where it has a reference to an object."""
    number = result["result"].get("objectId")
    if number is None or "exceptionDetails" in result:
        return result
    try:
        if result["result"].get("subtype") == "promise":
            return call("Runtime.awaitPromise", promiseObjectId=number, returnByValue=True)
        # As an argument: as `this`, a symbol would be an object.
        function, arguments = "value => value", [{"objectId": number}]
        return call(
            "Runtime.callFunctionOn", objectId=number, functionDeclaration=function, arguments=arguments, returnByValue=True
        )
    finally:
        _send_if_there("Runtime.releaseObject", call, objectId=number)


def _send_if_there(method: str, call: Callable[..., dict[str, Any]], **params: Any) -> None:
    """Give something up that may be gone already, with the page that it belonged to."""
    try:
        call(method, **params)
    except (CDPError, TabClosed, DialogOpen):
        return


def _is_body(result: dict[str, Any]) -> bool:
    """Return whether the code is only valid in a function. Then nothing ran: an error of code that runs has a stack."""
    details = result.get("exceptionDetails") or {}
    description = (details.get("exception") or {}).get("description")
    return "stackTrace" not in details and description == "SyntaxError: Illegal return statement"


def _thrown(details: dict[str, Any]) -> str:
    exception = details.get("exception") or {}
    text = exception.get("description")
    if text is None and "value" in exception:
        value = exception["value"]
        text = value if isinstance(value, str) else {None: "null", True: "true", False: "false"}.get(value, str(value))
    return text or str(details.get("text", "the page's code threw"))


def _unserializable(text: str) -> float | int:
    return int(text[:-1]) if text.endswith("n") else float({"Infinity": "inf", "-Infinity": "-inf"}.get(text, text))


# Input. A dialog that it opens does not make it fail: what was asked for has happened.


def click_at_xy(x: float, y: float, button: str = "left", clicks: int = 1, *, timeout: float = TIMEOUT) -> None:
    """Click at a place of the viewport, in CSS pixels. `button` is left, middle or right; two `clicks` are a double click."""
    try:
        _mouse("mouseMoved", x, y, timeout)
    except DialogOpen as error:
        # That was not the click.
        raise DialogOpen(str(error), dialog=error.dialog, ran=False) from None
    with _may_open_dialog():
        for count in range(1, clicks + 1):
            _mouse("mousePressed", x, y, timeout, button=button, clickCount=count)
            _mouse("mouseReleased", x, y, timeout, button=button, clickCount=count)


def scroll(x: float, y: float, dy: float = -300, dx: float = 0, *, timeout: float = TIMEOUT) -> None:
    """Turn the mouse wheel at a place of the viewport: `dy` CSS pixels down (below 0, up), `dx` to the right."""
    with _may_open_dialog():
        _mouse("mouseWheel", x, y, timeout, deltaX=dx, deltaY=dy)


def type_text(text: str, *, timeout: float = TIMEOUT) -> None:
    """Insert text where the focus is, as a paste does: no key events (see `press_key`)."""
    with _may_open_dialog():
        cdp("Input.insertText", text=text, timeout=timeout)


def press_key(key: str, modifiers: int = 0, *, timeout: float = TIMEOUT) -> None:
    """Press and release a key: a character, or a name such as Enter, Tab, Escape, Backspace, ArrowDown, PageUp or F5.

    `modifiers` is the sum of 1 for Alt, 2 for Ctrl, 4 for Meta (Cmd) and 8 for Shift. Raises `ValueError` for an unknown name.
    """
    name = "Space" if key == " " else key
    if name in _KEYS:
        code, (number, text) = name, _KEYS[name]
        key = " " if name == "Space" else key
    elif len(key) == 1:
        number, text, code = 0, key, ""
        if key.isascii() and key.isalnum():
            number = ord(key.upper())
            code = f"Digit{key}" if key.isdigit() else f"Key{key.upper()}"
    else:
        raise ValueError(f"there is no key {key!a}: give one character, or one of {', '.join(_KEYS)}")
    event: dict[str, Any] = {"key": key, "code": code, "modifiers": modifiers}
    event |= {"windowsVirtualKeyCode": number, "nativeVirtualKeyCode": number}
    down: dict[str, Any] = {"type": "rawKeyDown"}
    if text and not modifiers & (_ALT | _CONTROL | _META):
        down = {"type": "keyDown", "text": text}
    elif sys.platform == "darwin" and modifiers & _META and key in _COMMANDS:
        down["commands"] = [_COMMANDS[key]]
    with _may_open_dialog():
        cdp("Input.dispatchKeyEvent", **event, **down, timeout=timeout)
        cdp("Input.dispatchKeyEvent", **event, type="keyUp", timeout=timeout)


def _mouse(kind: str, x: float, y: float, timeout: float, **params: Any) -> None:
    cdp("Input.dispatchMouseEvent", type=kind, x=x, y=y, timeout=timeout, **params)


@contextlib.contextmanager
def _may_open_dialog() -> Iterator[None]:
    """Take a dialog that opens within for a part of what was asked for, but not one that has kept it from being done."""
    try:
        yield
    except DialogOpen as error:
        if not error.data.get("ran"):
            raise


def handle_dialog(accept: bool = True, text: str | None = None, *, timeout: float = TIMEOUT) -> None:
    """Answer the dialog that holds the page: accept or dismiss it. A prompt is answered with `text`, else with its default.

    Raises `CDPError` if there is none, and `ValueError` if the default has more than 16,384 characters: give `text` then.
    """
    if accept and text is None:
        text = (_send({"meta": "pending_dialog"}, timeout=timeout)["dialog"] or {}).get("defaultPrompt")
        if text is not None and len(text) > MAX_TEXT:
            raise ValueError(f"only {MAX_TEXT} characters of the prompt's default are kept: answer it with text=")
    params: dict[str, Any] = {"accept": accept}
    if text is not None:
        params["promptText"] = text
    cdp("Page.handleJavaScriptDialog", timeout=timeout, **params)


# What it looks like.


def capture_screenshot(path: str | os.PathLike[str] | None = None, full: bool = False, *, timeout: float = TIMEOUT) -> Any:
    """Take a PNG of the viewport, or of the `full` page. Return its bytes, or the `path` it was written to.

    The file is written beside it under a name that nobody can guess, private until it is complete, and renamed. It keeps the
    mode of the file of yours that it replaces; a new one gets what the umask leaves of 0666. A symbolic link is replaced, not
    followed. Raises `OSError` if the file can't be written; what was there before is then still there.
    """
    params: dict[str, Any] = {"format": "png"}
    if full:
        size = cdp("Page.getLayoutMetrics", timeout=timeout)["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        params |= {"captureBeyondViewport": True, "clip": clip}
    data = binascii.a2b_base64(cdp("Page.captureScreenshot", timeout=timeout, **params)["data"])
    if path is None:
        return data
    replace_file(path, data)
    return path


# Tabs.


def list_tabs(include_chrome: bool = True, *, timeout: float = TIMEOUT) -> list[dict[str, str]]:
    """Return the tabs, each with targetId, url and title; the browser's own pages only with `include_chrome`."""
    return [
        {"targetId": info["targetId"], "title": info.get("title", ""), "url": info.get("url", "")}
        for info in cdp("Target.getTargets", timeout=timeout)["targetInfos"]
        if info["type"] == "page" and (include_chrome or not info.get("url", "").startswith(INTERNAL))
    ]


def current_tab(*, timeout: float = TIMEOUT) -> dict[str, str]:
    """Return targetId, url and title of the tab that this process is in."""
    reply = _send({"meta": "current_tab"}, timeout=timeout)
    return {key: reply[key] for key in ("targetId", "url", "title")}


def switch_tab(target: str | dict[str, str], *, timeout: float = TIMEOUT) -> str:
    """Go on in another tab, and show it. Processes that start later begin there, too. Return its session.

    `target` is a targetId, or what `list_tabs` and `current_tab` give. Raises `TabClosed` if there is no such tab.
    """
    session = _enter(_target_id(target), timeout)
    cdp("Target.activateTarget", targetId=_target_id(target), timeout=timeout)
    return session


def new_tab(url: str = "about:blank", *, timeout: float = TIMEOUT) -> str:
    """Open a tab, go on in it as with `switch_tab`, and return its targetId. Raises what `goto_url` does."""
    target: str = cdp("Target.createTarget", url="about:blank", timeout=timeout)["targetId"]
    _enter(target, timeout)
    if url != "about:blank":
        # Not with its creation: then the empty document could be taken for the page.
        goto_url(url, timeout=timeout)
    return target


def close_tab(target: str | dict[str, str] | None = None, *, timeout: float = TIMEOUT) -> None:
    """Close a tab: the one that this process is in, if none is given. It then is in the daemon's tab.

    Raises `CDPError` if there is no such tab.
    """
    global _session
    own = _send({"meta": "session"}, timeout=timeout)["target_id"]
    target_id = own if target is None else _target_id(target)
    cdp("Target.closeTarget", targetId=target_id, timeout=timeout)
    if target_id == own:
        _session = None


def ensure_real_tab(*, timeout: float = TIMEOUT) -> dict[str, str] | None:
    """Leave a page that is the browser's own for another, if there is one; return the tab, or None."""
    tab = current_tab(timeout=timeout)
    if not tab["url"].startswith(INTERNAL):
        return tab
    tabs = list_tabs(include_chrome=False, timeout=timeout)
    if not tabs:
        return None
    switch_tab(tabs[0], timeout=timeout)
    return tabs[0]


def iframe_target(url_part: str, *, timeout: float = TIMEOUT) -> str | None:
    """Return the targetId of the page's first iframe of another site that has `url_part` in its url, for `js`, or None.

    An iframe of the page's own site is no target: reach it from the page, as in
    ``document.querySelector("iframe").contentDocument``.
    """
    page = _send({"meta": "session"}, timeout=timeout)["target_id"]
    infos = {info["targetId"]: info for info in cdp("Target.getTargets", timeout=timeout)["targetInfos"]}
    for target, info in infos.items():
        if info["type"] == "iframe" and url_part in info.get("url", ""):
            root = target
            while parent := infos.get(root, {}).get("parentId"):
                root = parent
            # Itself, where an older browser names no parent.
            if root in (page, target):
                return str(target)
    return None


def _enter(target_id: str, timeout: float) -> str:
    return str(_send({"meta": "set_session", "target_id": target_id}, timeout=timeout)["session_id"])


def _target_id(target: str | dict[str, str]) -> str:
    return target["targetId"] if isinstance(target, dict) else target


# Events and time.


def drain_events(*, timeout: float = TIMEOUT) -> list[dict[str, Any]]:
    """Return the events of this process's tab since the last call: method, params, session_id.

    At most the last 500 are kept, and at most 16 MiB of JSON. Texts of a page above 16,384 characters are cut, with the number
    of those left out behind them; the params of an event that is still above 16 MiB are ``{"left_out_bytes": N}``.
    """
    connect()
    if _session is None:
        # To be in a tab: without one, the events of all tabs are meant.
        _send({"meta": "session"}, timeout=timeout)
    events: list[dict[str, Any]] = _send({"meta": "drain_events"}, timeout=timeout)["events"]
    return events


def wait(seconds: float = 1.0) -> None:
    """Let time pass. `wait_for_load` and a promise in `js` wait for something."""
    time.sleep(seconds)

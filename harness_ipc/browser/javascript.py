"""JavaScript in the page: a scope for each call, its values, and what it throws, as Python has them."""

from __future__ import annotations

import contextlib
import json

from harness_ipc import escape_control

from . import TIMEOUT
from .arguments import check_seconds, check_text
from .errors import BrowserError, BrowserTimeout, CDPError, JavaScriptError
from .own_imports import without_program_directory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .nodes import Target
    from .tab import Tab

    Call = Callable[..., dict[str, Any]]

# JSON-RPC's code of what Chrome says of code that ran for longer than it was given.
_INTERNAL_ERROR = -32603
# Seconds for Chrome, which ends such code itself, to say so; and for a page that does not compute to answer.
_ENDING = 2.0
_PROBE = 1.0
# Seconds beyond its timeout for code that we end ourselves.
_BACKSTOP = 10.0
# What a script declares for all later ones, and a block only for itself.
_LEXICAL = ("let", "const", "class")
_IF_EVAL = "if (/native code/.test(eval))"
_BODY = "(async () => {"
# Code that is valid in here has no brace that closes what it was put into.
_CHECK = "[async () => {"


def js(
    tab: Tab, expression: str, target_id: str | None = None, *, frame: Target | None = None, timeout: float = TIMEOUT
) -> Any:
    """Evaluate JavaScript in the page, or in an iframe, and return its value.

    ```python
    js("document.title")
    js("await fetch('/api').then(reply => reply.json())")
    js("const rows = document.querySelectorAll('tr'); rows.length")
    js("const a = 6; return a * 7")
    js("location.href", frame="#payment")
    ```

    `frame` is a part of the iframe's URL, or what means its element, as in `click`; `target_id` the id that `iframe_target`
    gives, or that of another target, such as a tab.

    The value is that of the last expression, or what a top-level ``return`` gives. ``const``, ``let`` and ``class`` are the
    call's own; ``var`` and functions stay in the page, but not those of code with a top-level ``return``, a function's body,
    and not the functions of code that waits.

    A promise is waited for. undefined and null are None; NaN and the infinities floats; a BigInt an int; whatever else has to
    be what JSON can carry (inside an object or an array, NaN is None). Code that computes for longer than `timeout` is ended.

    Raises `JavaScriptError` for what the code throws, `BrowserTimeout`, `CDPError` for a value that can't be carried, and
    `ElementNotFound` for an iframe that is not there.
    """
    check_text("js", "expression", expression)
    check_seconds("timeout", timeout)
    if target_id is not None:
        check_text("js", "target_id", target_id)
        if frame is not None:
            raise TypeError("js() takes a target_id or a frame, not both")
        where = tab.request({"meta": "frame", "frame": target_id}, timeout=timeout)
    elif frame is not None:
        with without_program_directory():
            from . import nodes

        where = nodes.frame_of(tab, frame, timeout=timeout)
    else:
        return _evaluate(tab, expression, None, timeout)
    if where["frame_id"]:
        # Of the tab's own session the successor is asked, once it has ended.
        session = None if where["node_session"] == where["session_id"] else where["node_session"]
        return _evaluate(tab, expression, session, timeout, where["context"])
    number = tab.cdp("Target.attachToTarget", targetId=target_id, flatten=True, timeout=timeout)["sessionId"]
    try:
        return _evaluate(tab, expression, number, timeout)
    finally:
        tab.try_cdp("Target.detachFromTarget", sessionId=number, timeout=timeout)


def _evaluate(tab: Tab, expression: str, session: str | None, timeout: float, context: str | None = None) -> Any:
    """Run the code in a session, in the execution context `context` of it or else in its own document."""
    # Code that Chrome ends after an `await` it leaves unanswered: `_timed_out` ends that.
    limit = timeout if "await" in expression else timeout + _ENDING

    def call(method: str, **params: Any) -> dict[str, Any]:
        if context is not None and method == "Runtime.evaluate":
            params["uniqueContextId"] = context
        message = {"method": method, "params": params, "session_id": session}
        result: dict[str, Any] = tab.request(message, timeout=limit)["result"]
        return result

    try:
        result, prefix = _run(tab, call, expression, session, timeout)
    except CDPError as error:
        if error.code == _INTERNAL_ERROR:
            raise BrowserTimeout(f"the code ran for more than {timeout:g} s, and was ended") from None
        raise
    except BrowserTimeout:
        raise _timed_out(tab, expression, session, timeout) from None
    if (details := result.get("exceptionDetails")) is not None:
        raise _thrown(details, expression, prefix)
    value = result["result"]
    return _unserializable(value["unserializableValue"]) if "unserializableValue" in value else value.get("value")


def _run(tab: Tab, call: Call, expression: str, session: str | None, timeout: float) -> tuple[dict[str, Any], str]:
    """Return what the browser says of the code, and what was put before it."""
    if _may_close_block(expression):
        # A script with half a block at its ends is an error, though it completes ours.
        checked = call("Runtime.compileScript", expression=f"{_CHECK}{expression}\n}}]", sourceURL="", persistScript=False)
        if "exceptionDetails" in checked:
            return checked, _CHECK
    waits = "await" in expression
    # Milliseconds, at which Chrome ends the code, though its caller may have gone.
    limit = min((timeout + _BACKSTOP * waits) * 1000, 2**31 - 1)
    options = {"awaitPromise": True, "userGesture": True, "timeout": limit}
    prefix, code = _in_block(expression)
    if waits:
        # Only replMode takes it for what it is, whatever stands behind it, and then gives no value but a reference.
        result = call("Runtime.evaluate", expression=code, replMode=True, **options)
        result = _dereference(tab, call, result, session)
    else:
        result = call("Runtime.evaluate", expression=code, returnByValue=True, **options)
    if _is_body(result):
        prefix, code = _BODY, f"{_BODY}{expression}\n}})()"
        result = call("Runtime.evaluate", expression=code, returnByValue=True, **options)
    return result, prefix


def _in_block(expression: str) -> tuple[str, str]:
    """Return what is put before the code, and the code in a block, which has the value that the script would have."""
    if not any(word in expression for word in _LEXICAL):
        return "", expression
    prefix, end = ("'use strict';{" if _is_strict(expression) else "{"), "\n}"
    if "function" in expression and "await" in expression:
        # As below, but there is no `eval` for it: V8 takes no value from functions that can't become global.
        if prefix == "{" and (names := _declared_functions(expression)):
            prefix, end = f"{{let {','.join(names)}; {{", "\n}}"
    elif "function" in expression:
        # A function that a block declares is its value in V8, though it has none; with `eval`, which a page may have replaced,
        # it is not. Runtime.evaluate allows `eval` whatever the page's policy is. That the code is valid, the block tells.
        prefix = f"{_IF_EVAL} (0, eval)({json.dumps(expression)}); else {{"
    return prefix, f"{prefix}{expression}{end}"


def _declared_functions(code: str) -> list[str]:
    """Return the names of what looks like a declaration of a function."""
    import re

    return sorted(set(re.findall(r"(?:^|[;{}\n])\s*function\s+([\w$]+)\s*\(", code)))


def _is_strict(code: str) -> bool:
    """Return whether the code begins with the directive, which has no effect inside a block."""
    code = code.lstrip()
    while code.startswith(("//", "/*")):
        code = code.partition("\n" if code.startswith("//") else "*/")[2].lstrip()
    return code.startswith(("'use strict'", '"use strict"'))


def _may_close_block(code: str) -> bool:
    """Return whether a brace closes more than was opened; it may be part of a string."""
    depth = 0
    for part in code.split("}")[:-1]:
        depth += part.count("{") - 1
        if depth < 0:
            return True
    return False


def _dereference(tab: Tab, call: Call, result: dict[str, Any], session: str | None) -> dict[str, Any]:
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
        tab.try_cdp("Runtime.releaseObject", session, objectId=number)


def _is_body(result: dict[str, Any]) -> bool:
    """Return whether the code is only valid in a function. Then nothing ran: an error of code that runs has a stack."""
    details = result.get("exceptionDetails") or {}
    description = (details.get("exception") or {}).get("description")
    return "stackTrace" not in details and description == "SyntaxError: Illegal return statement"


def _timed_out(tab: Tab, expression: str, session: str | None, timeout: float) -> BrowserTimeout:
    """Return the error for code that has not ended. Where the page computes after an `await` of it, that is ended.

    Chrome's own limit ends with the first wait. Without one, the code may not even have begun: the page computes by itself.
    """
    with contextlib.suppress(BrowserError):
        try:
            tab.cdp("Runtime.evaluate", session, expression="0", timeout=_PROBE)
        except BrowserTimeout:
            if "await" not in expression:
                return BrowserTimeout(f"the page was busy for more than {timeout:g} s, and the code may not have begun")
            tab.cdp("Runtime.terminateExecution", session, timeout=timeout + _ENDING)
            return BrowserTimeout(f"the code ran for more than {timeout:g} s, and was ended")
    return BrowserTimeout(f"the code has not ended within {timeout:g} s: it waits for a promise that is not settled")


def _thrown(details: dict[str, Any], expression: str, prefix: str) -> JavaScriptError:
    """Return the error for what the code threw, at the line and column (from 0) of the code as it was given."""
    # Of a rejected promise, Chrome counts from 1 but in its stack.
    frame = next(iter(details.get("stackTrace", {}).get("callFrames", [])), None)
    place = frame or details
    line, column = place["lineNumber"], place["columnNumber"]
    text = _exception_text(details)
    if line == 0 and not place.get("url") and not (frame and prefix.startswith(_IF_EVAL)):
        column -= len(prefix)
    if prefix and line > expression.count("\n"):
        # The closing brace is ours.
        text = text.replace("Unexpected token '}'", "Unexpected end of input")
        line, column = expression.count("\n"), len(expression.rpartition("\n")[2])
    return JavaScriptError(escape_control(text, allow="\n\t"), line=line, column=column)


def _exception_text(details: dict[str, Any]) -> str:
    exception = details.get("exception") or {}
    text = exception.get("description")
    if text is None and "value" in exception:
        value = exception["value"]
        text = value if isinstance(value, str) else {None: "null", True: "true", False: "false"}.get(value, str(value))
    return text or str(details.get("text", "the page's code threw"))


def _unserializable(text: str) -> float | int:
    return int(text[:-1]) if text.endswith("n") else float({"Infinity": "inf", "-Infinity": "-inf"}.get(text, text))

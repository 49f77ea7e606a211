"""JavaScript in the page: each call has its own scope; values and exceptions are converted to Python."""

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

# JSON-RPC code of Chrome's error for code that exceeded its timeout.
_INTERNAL_ERROR = -32603
# Seconds for Chrome to report that it has terminated such code, and for an idle page to answer.
_ENDING = 2.0
_PROBE = 1.0
# Seconds beyond the timeout, for code that the client terminates.
_BACKSTOP = 10.0
# Declarations that a script makes for later ones, and a block only for itself.
_LEXICAL = ("let", "const", "class")
_IF_EVAL = "if (/native code/.test(eval))"
_BODY = "(async () => {"
# Code that is valid in this prefix and its end can't close a surrounding block.
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

    `frame` is a part of the iframe's URL, or a target as in `click`; `target_id` is an id from `iframe_target`, or that of
    another target, such as a tab.

    The value is that of the last expression, or of a top-level ``return``. ``const``, ``let`` and ``class`` are local to the
    call. ``var`` and functions stay in the page, except in code with a top-level ``return``, which runs as the body of a
    function, and except functions of code with ``await``.

    A promise is awaited. undefined and null become None, NaN and infinities floats, and a BigInt an int. Other values must be
    JSON (NaN inside an object or an array becomes None). Code that runs for longer than `timeout` is terminated.

    Raises `JavaScriptError` if the code throws, `BrowserTimeout`, `CDPError` for a value that is not JSON, and
    `ElementNotFound` if there is no such iframe.
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
        # None for the tab's own session: if that has ended, the session that replaces it is used.
        session = None if where["node_session"] == where["session_id"] else where["node_session"]
        return _evaluate(tab, expression, session, timeout, where["context"])
    number = tab.cdp("Target.attachToTarget", targetId=target_id, flatten=True, timeout=timeout)["sessionId"]
    try:
        return _evaluate(tab, expression, number, timeout)
    finally:
        tab.try_cdp("Target.detachFromTarget", sessionId=number, timeout=timeout)


def _evaluate(tab: Tab, expression: str, session: str | None, timeout: float, context: str | None = None) -> Any:
    """Run the code in a session, in the execution context `context` or by default in the session's document."""
    # Chrome does not answer if it terminates code after an `await`: see `_timed_out`.
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
            raise BrowserTimeout(f"the code ran for more than {timeout:g} s, and was terminated") from None
        raise
    except BrowserTimeout:
        raise _timed_out(tab, expression, session, timeout) from None
    if (details := result.get("exceptionDetails")) is not None:
        raise _thrown(details, expression, prefix)
    value = result["result"]
    return _unserializable(value["unserializableValue"]) if "unserializableValue" in value else value.get("value")


def _run(tab: Tab, call: Call, expression: str, session: str | None, timeout: float) -> tuple[dict[str, Any], str]:
    """Return the browser's result for the code, and the prefix that was added to it."""
    if _may_close_block(expression):
        # Refuse code with unbalanced braces, which would become valid in our block.
        checked = call("Runtime.compileScript", expression=f"{_CHECK}{expression}\n}}]", sourceURL="", persistScript=False)
        if "exceptionDetails" in checked:
            return checked, _CHECK
    waits = "await" in expression
    # Milliseconds after which Chrome terminates the code, even if its caller is gone.
    limit = min((timeout + _BACKSTOP * waits) * 1000, 2**31 - 1)
    options = {"awaitPromise": True, "userGesture": True, "timeout": limit}
    prefix, code = _in_block(expression)
    if waits:
        # Only replMode parses such code in any position; it returns a reference instead of the value.
        result = call("Runtime.evaluate", expression=code, replMode=True, **options)
        result = _dereference(tab, call, result, session)
    else:
        result = call("Runtime.evaluate", expression=code, returnByValue=True, **options)
    if _is_body(result):
        prefix, code = _BODY, f"{_BODY}{expression}\n}})()"
        result = call("Runtime.evaluate", expression=code, returnByValue=True, **options)
    return result, prefix


def _in_block(expression: str) -> tuple[str, str]:
    """Return a prefix, and the code in a block that has the same value as the script."""
    if not any(word in expression for word in _LEXICAL):
        return "", expression
    prefix, end = ("'use strict';{" if _is_strict(expression) else "{"), "\n}"
    if "function" in expression and "await" in expression:
        # As below, but without `eval`: V8 ignores the value of functions that can't become global.
        if prefix == "{" and (names := _declared_functions(expression)):
            prefix, end = f"{{let {','.join(names)}; {{", "\n}}"
    elif "function" in expression:
        # In V8, a function declared last in a block is the value of the block, which it should not be. `eval` does not have
        # that fault, but a page may have replaced it. Runtime.evaluate allows `eval` under any content security policy. The
        # block still checks the syntax.
        prefix = f"{_IF_EVAL} (0, eval)({json.dumps(expression)}); else {{"
    return prefix, f"{prefix}{expression}{end}"


def _declared_functions(code: str) -> list[str]:
    """Return the names of possible function declarations."""
    import re

    return sorted(set(re.findall(r"(?:^|[;{}\n])\s*function\s+([\w$]+)\s*\(", code)))


def _is_strict(code: str) -> bool:
    """Return whether the code begins with "use strict", which has no effect inside a block."""
    code = code.lstrip()
    while code.startswith(("//", "/*")):
        code = code.partition("\n" if code.startswith("//") else "*/")[2].lstrip()
    return code.startswith(("'use strict'", '"use strict"'))


def _may_close_block(code: str) -> bool:
    """Return whether there may be an unbalanced closing brace. Braces in strings count too."""
    depth = 0
    for part in code.split("}")[:-1]:
        depth += part.count("{") - 1
        if depth < 0:
            return True
    return False


def _dereference(tab: Tab, call: Call, result: dict[str, Any], session: str | None) -> dict[str, Any]:
    """Return the result with the value instead of a reference to it."""
    number = result["result"].get("objectId")
    if number is None or "exceptionDetails" in result:
        return result
    try:
        if result["result"].get("subtype") == "promise":
            return call("Runtime.awaitPromise", promiseObjectId=number, returnByValue=True)
        # As an argument: as `this`, a symbol would become an object.
        function, arguments = "value => value", [{"objectId": number}]
        return call(
            "Runtime.callFunctionOn", objectId=number, functionDeclaration=function, arguments=arguments, returnByValue=True
        )
    finally:
        tab.try_cdp("Runtime.releaseObject", session, objectId=number)


def _is_body(result: dict[str, Any]) -> bool:
    """Return whether the code is only valid in a function. It did not run then: errors of running code have a stack."""
    details = result.get("exceptionDetails") or {}
    description = (details.get("exception") or {}).get("description")
    return "stackTrace" not in details and description == "SyntaxError: Illegal return statement"


def _timed_out(tab: Tab, expression: str, session: str | None, timeout: float) -> BrowserTimeout:
    """Return the error for code that has not finished. If it is still computing after an `await`, terminate it.

    Chrome's own timeout applies only until the first `await`. Code without one may not have started: the page is busy.
    """
    with contextlib.suppress(BrowserError):
        try:
            tab.cdp("Runtime.evaluate", session, expression="0", timeout=_PROBE)
        except BrowserTimeout:
            if "await" not in expression:
                return BrowserTimeout(f"the page was busy for more than {timeout:g} s, and the code may not have started")
            tab.cdp("Runtime.terminateExecution", session, timeout=timeout + _ENDING)
            return BrowserTimeout(f"the code ran for more than {timeout:g} s, and was terminated")
    return BrowserTimeout(f"the code has not finished within {timeout:g} s: it waits for a promise that is not settled")


def _thrown(details: dict[str, Any], expression: str, prefix: str) -> JavaScriptError:
    """Return the error for an exception, with its line and column (from 0) in the code of the caller."""
    # For a rejected promise, Chrome counts from 1, except in the stack.
    frame = next(iter(details.get("stackTrace", {}).get("callFrames", [])), None)
    place = frame or details
    line, column = place["lineNumber"], place["columnNumber"]
    text = exception_text(details)
    if line == 0 and not place.get("url") and not (frame and prefix.startswith(_IF_EVAL)):
        column -= len(prefix)
    if prefix and line > expression.count("\n"):
        # The closing brace is that of our block.
        text = text.replace("Unexpected token '}'", "Unexpected end of input")
        line, column = expression.count("\n"), len(expression.rpartition("\n")[2])
    return JavaScriptError(text, line=line, column=column)


def exception_text(details: dict[str, Any]) -> str:
    """Return what was thrown as text, by CDP's ``exceptionDetails``, without control characters."""
    exception = details.get("exception") or {}
    text = exception.get("description")
    if text is None and "value" in exception:
        value = exception["value"]
        text = value if isinstance(value, str) else {None: "null", True: "true", False: "false"}.get(value, str(value))
    return escape_control(text or str(details.get("text", "the page's code threw")), allow="\n\t")


def _unserializable(text: str) -> float | int:
    return int(text[:-1]) if text.endswith("n") else float({"Infinity": "inf", "-Infinity": "-inf"}.get(text, text))

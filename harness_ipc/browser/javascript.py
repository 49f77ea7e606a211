"""JavaScript in the page: its values, and what it throws, as Python has them."""

from __future__ import annotations

from harness_ipc import escape_control

from . import TIMEOUT
from .errors import BrowserTimeout, CDPError, JavaScriptError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .tab import Tab

# JSON-RPC's code of what Chrome says of code that ran for longer than it was given.
_INTERNAL_ERROR = -32603


def js(tab: Tab, expression: str, target_id: str | None = None, *, timeout: float = TIMEOUT) -> Any:
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
        return _evaluate(tab, expression, None, timeout)
    number = tab.cdp("Target.attachToTarget", targetId=target_id, flatten=True, timeout=timeout)["sessionId"]
    try:
        return _evaluate(tab, expression, number, timeout)
    finally:
        tab.try_cdp("Target.detachFromTarget", sessionId=number, timeout=timeout)


def _evaluate(tab: Tab, expression: str, session: str | None, timeout: float) -> Any:
    def call(method: str, **params: Any) -> dict[str, Any]:
        message = {"method": method, "params": params, "session_id": session}
        result: dict[str, Any] = tab.request(message, timeout=timeout)["result"]
        return result

    # Milliseconds. A page that computes for ever would answer nothing any more.
    options = {"awaitPromise": True, "userGesture": True, "timeout": min(timeout * 1000, 2**31 - 1)}
    try:
        if "await" in expression:
            # Only replMode takes it for what it is, whatever stands behind it, and then gives no value but a reference.
            result = call("Runtime.evaluate", expression=expression, replMode=True, **options)
            result = _dereference(tab, call, result, session)
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


def _dereference(tab: Tab, call: Callable[..., dict[str, Any]], result: dict[str, Any], session: str | None) -> dict[str, Any]:
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


def _thrown(details: dict[str, Any]) -> str:
    exception = details.get("exception") or {}
    text = exception.get("description")
    if text is None and "value" in exception:
        value = exception["value"]
        text = value if isinstance(value, str) else {None: "null", True: "true", False: "false"}.get(value, str(value))
    return text or str(details.get("text", "the page's code threw"))


def _unserializable(text: str) -> float | int:
    return int(text[:-1]) if text.endswith("n") else float({"Infinity": "inf", "-Infinity": "-inf"}.get(text, text))

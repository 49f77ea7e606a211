"""Which browser a command's environment asks for, and whether the daemon's browser is that one.

`BU_CDP_WS` and `BU_CDP_URL` ask for the browser at that address. `HARNESS_CHROME_OWN`, `HARNESS_CHROME_PROFILE` and
`HARNESS_CHROME_ARGS` ask for a managed one; `HARNESS_CHROME`, `HARNESS_CHROME_ENV` and `HARNESS_CHROME_DOWNLOADS` say how it is
started. A variable that is not set matches any browser. Clients import this module: heavy imports are local.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

WEBSOCKET = "BU_CDP_WS"
URL = "BU_CDP_URL"
OWN = "HARNESS_CHROME_OWN"
PROFILE = "HARNESS_CHROME_PROFILE"
ARGUMENTS = "HARNESS_CHROME_ARGS"
BINARY = "HARNESS_CHROME"
# Further variables to pass to a managed browser, separated by commas. A name may end with *.
ENVIRONMENT = "HARNESS_CHROME_ENV"
DOWNLOADS = "HARNESS_CHROME_DOWNLOADS"
# Permits a start; not a setting of the browser.
ROOT = "HARNESS_CHROME_ROOT"

_REQUIRE_MANAGED = (OWN, PROFILE, ARGUMENTS)
_OF_MANAGED = (BINARY, ENVIRONMENT, DOWNLOADS)


def wants_managed(environment: Mapping[str, str]) -> bool:
    """Return whether the environment requires a managed browser."""
    return any(environment.get(variable) for variable in _REQUIRE_MANAGED)


def requested_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that apply, with absolute paths. An address overrides the settings of a managed browser."""
    for variable in (WEBSOCKET, URL):
        if value := environment.get(variable):
            return {variable: value}
    found = {variable: environment[variable] for variable in (*_REQUIRE_MANAGED, *_OF_MANAGED) if environment.get(variable)}
    for variable in (PROFILE, DOWNLOADS, BINARY):
        # A program without a directory is searched in PATH.
        if variable in found and (variable != BINARY or os.path.dirname(found[variable])):
            found[variable] = os.path.abspath(found[variable])
    return found


def reload_command(name: str) -> str:
    """Return the shell command that ends the daemon `name`, so that the next command starts a new one."""
    return f"harness-browser --name={name} --reload"


def find_mismatch(
    wanted: Mapping[str, str],
    own: Mapping[str, str] | None,
    named: tuple[str, str] | None = None,
    endpoint: str | None = None,
) -> tuple[str, str] | None:
    """Return the first of the `wanted` settings that the daemon's browser does not match, and its own value; None if all match.

    Both are text. `wanted` is a result of `requested_settings`. `own` are the settings of a managed browser, including `BINARY`
    and `PROFILE`. For another browser, `named` is the variable and the address by which it was found, if any, and `endpoint` is
    the address of its WebSocket.
    """
    for variable, value in wanted.items():
        if variable in (WEBSOCKET, URL):
            fits = own is None and _is_address(variable, value, named, endpoint)
        elif variable in _REQUIRE_MANAGED or own is not None:
            fits = own is not None and (variable == OWN or _is_setting(variable, value, own.get(variable, "")))
        else:
            continue
        if not fits and own is not None and variable in (ARGUMENTS, *_OF_MANAGED):
            return show(variable, value), f" with {show(variable, held) if (held := own.get(variable)) else f'no {variable}'}"
        if not fits:
            return show(variable, value), ""
    return None


def show(variable: str, value: str) -> str:
    """Return the variable with its value, without secrets."""
    if variable in (WEBSOCKET, URL):
        from .addresses import without_secret

        return f"{variable}, {without_secret(value)}"
    if variable == ARGUMENTS:
        value = " ".join(word.partition("=")[0] for word in _split(value))
    return f"{variable}={value}"


def _is_address(variable: str, value: str, named: tuple[str, str] | None, endpoint: str | None) -> bool:
    from urllib.parse import urlsplit

    if (variable, value) == named or value == endpoint:
        return True
    try:
        parts = urlsplit(value)
        here, there = (_server(url) for url in (value, endpoint or ""))
    except ValueError:
        return False
    if variable == WEBSOCKET or parts.username or parts.query or parts.path.strip("/"):
        # One host and port may serve several browsers.
        before = named[1] if named is not None and named[0] == variable else endpoint or ""
        return _without_server(value) == _without_server(before) and here == _server(before)
    return here == there


def _server(url: str) -> tuple[str, str, int]:
    from .addresses import address_of, is_local

    host, port = address_of(url)
    secure = "s" if url.partition(":")[0] in ("https", "wss") else ""
    return secure, "localhost" if is_local(url) else host, port


def _without_server(url: str) -> tuple[str | None, str | None, str, str]:
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    return parts.username, parts.password, parts.path.rstrip("/"), parts.query


def _is_setting(variable: str, value: str, held: str) -> bool:
    if variable == ARGUMENTS:
        return _split(value) == _split(held)
    if variable == ENVIRONMENT:
        return {name.strip() for name in value.split(",")} == {name.strip() for name in held.split(",")}
    if variable == BINARY:
        import shutil

        value = shutil.which(value) or value
    return bool(held) and os.path.realpath(value) == os.path.realpath(held)


def _split(arguments: str) -> list[str]:
    import shlex

    try:
        return shlex.split(arguments)
    except ValueError:
        return [arguments]

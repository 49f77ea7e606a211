"""The program, arguments and environment of a managed browser, and whether it may be started."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import sys
from typing import TYPE_CHECKING

from harness_ipc import HarnessIPCError, create_private_dir

from .display import WAYLAND, X11, find_broken
from .errors import BrowserNotFound
from .requested import ARGUMENTS, BINARY, DOWNLOADS, ENVIRONMENT, PROFILE, ROOT

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

# On Windows, Chrome inherits pipe handles (--remote-debugging-io-pipes), which end with the daemon, so the browser could not be
# adopted. It has a port there, whose number and path are in the profile.
USES_PIPE = sys.platform != "win32"

if sys.platform == "win32":
    _BINARIES = [
        os.path.expandvars(f"{root}/{place}")
        for place in (
            "Google/Chrome/Application/chrome.exe",
            "Chromium/Application/chrome.exe",
            "Microsoft/Edge/Application/msedge.exe",
            "BraveSoftware/Brave-Browser/Application/brave.exe",
        )
        for root in ("%ProgramFiles%", "%ProgramFiles(x86)%", "%LocalAppData%")
    ]
elif sys.platform == "darwin":
    _BINARIES = [
        f"/Applications/{name}.app/Contents/MacOS/{name}"
        for name in ("Google Chrome", "Chromium", "Microsoft Edge", "Brave Browser")
    ]
else:
    _BINARIES = [
        "google-chrome",
        "google-chrome-stable",
        "chromium",
        "chromium-browser",
        "microsoft-edge",
        "microsoft-edge-stable",
        "brave-browser",
    ]


# For automation: no prompts, no background traffic, no key ring.
_FLAGS = [
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--password-store=basic",
    "--use-mock-keychain",
]
# Switches that are refused in HARNESS_CHROME_ARGS, and what to do instead.
_OPENED = "any page or program could control the browser; connect to one that you start yourself with BU_CDP_URL"
_REFUSED = {
    "remote-allow-origins": _OPENED,
    "remote-debugging-address": _OPENED,
    "remote-debugging-port": _OPENED,
    "remote-debugging-socket-name": _OPENED,
    "remote-debugging-targets": _OPENED,
    "remote-debugging-pipe": "the daemon sets it itself",
    "remote-debugging-io-pipes": "the daemon sets the pipe itself",
    "user-data-dir": f"set {PROFILE} instead",
}
# The size of a headless window in CSS pixels; Chrome's default is 800,600. HARNESS_CHROME_ARGS may override it.
_WINDOW = "1280,900"

if sys.platform == "win32":
    _VARIABLES = (
        "ALLUSERSPROFILE, APPDATA, COMMONPROGRAMFILES*, COMPUTERNAME, COMSPEC, HOMEDRIVE, HOMEPATH, LOCALAPPDATA, "
        "NUMBER_OF_PROCESSORS, OS, PATH, PATHEXT, PROCESSOR_*, PROGRAMDATA, PROGRAMFILES*, PROGRAMW6432, PUBLIC, SYSTEMDRIVE, "
        "SYSTEMROOT, TEMP, TMP, TZ, USERDOMAIN, USERNAME, USERPROFILE, WINDIR"
    )
else:
    _VARIABLES = (
        "HOME, LANG, LANGUAGE, LC_*, LOGNAME, PATH, SHELL, TMPDIR, TZ, USER, XDG_*, "
        # The display and the desktop.
        "DBUS_SESSION_BUS_ADDRESS, DESKTOP_SESSION, DISPLAY, FONTCONFIG_*, GTK_IM_MODULE, WAYLAND_DISPLAY, XAUTHORITY, "
        # The last two: the path of Chrome's sandbox, and a variable that macOS sets for each process.
        "XMODIFIERS, CHROME_DEVEL_SANDBOX, __CF_USER_TEXT_ENCODING, "
        # Proxies, in both cases, as read by Chrome's proxy_config_service_linux.cc.
        "ALL_PROXY, HTTPS_PROXY, HTTP_PROXY, NO_PROXY, all_proxy, auto_proxy, http_proxy, https_proxy, no_proxy"
    )


def find_binary() -> str | None:
    """Return the program: `HARNESS_CHROME`, by default the first known browser that is installed, or None."""
    demanded = os.environ.get(BINARY)
    return next(filter(None, map(shutil.which, [demanded] if demanded else _BINARIES)), None)


def command_line(binary: str, profile: str, *, window: bool) -> list[str]:
    """Return the command line of a managed browser, with a `window` or headless.

    Raises `BrowserNotFound` if `HARNESS_CHROME_ARGS` is invalid, or would open the browser to others.
    """
    devtools = "--remote-debugging-pipe" if USES_PIPE else "--remote-debugging-port=0"
    arguments = [binary, devtools, f"--user-data-dir={profile}", *_FLAGS]
    if not window:
        arguments += ["--headless=new", f"--window-size={_WINDOW}"]
    if is_root():
        # Chrome refuses to run as root otherwise.
        arguments.append("--no-sandbox")
    return [*arguments, *further_arguments(), "about:blank"]


def further_arguments() -> list[str]:
    """Return the arguments in `HARNESS_CHROME_ARGS`. Raises `BrowserNotFound` if they are invalid or refused."""
    try:
        found = shlex.split(os.environ.get(ARGUMENTS, ""))
    except ValueError as error:
        raise BrowserNotFound(
            f"{ARGUMENTS}={os.environ[ARGUMENTS]!a} can't be parsed: {error}; correct it, or unset it"
        ) from None
    for word in found:
        # Chrome also accepts one dash, and on Windows a slash.
        switch = word.lstrip("-/" if sys.platform == "win32" else "-").partition("=")[0].lower()
        if (advice := _REFUSED.get(switch)) is not None and switch != word:
            raise BrowserNotFound(f"{ARGUMENTS} has {word.partition('=')[0]}, which is refused: {advice}")
    return found


def browser_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of `environment` to pass to a browser: the usual ones, and those named by `HARNESS_CHROME_ENV`."""
    names = [name.strip() for name in f"{_VARIABLES},{environment.get(ENVIRONMENT, '')}".split(",")]
    if os.name == "nt":
        names = [name.upper() for name in names]
    prefixes = tuple(name[:-1] for name in names if name.endswith("*"))
    return {key: value for key, value in environment.items() if key in names or (prefixes and key.startswith(prefixes))}


def settings_digest() -> str:
    """Return a digest of the settings with which a browser is started now."""
    settings = [find_binary(), further_arguments(), sorted(os.environ.get(ENVIRONMENT, "").split(","))]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def download_behavior() -> dict[str, Any]:
    """Return the parameters of `Browser.setDownloadBehavior`: deny, or allow into the directory `HARNESS_CHROME_DOWNLOADS`.

    The directory is created with mode 0700 if it is missing. Raises `BrowserNotFound` if it can't be used.
    """
    folder = os.environ.get(DOWNLOADS)
    if not folder:
        return {"behavior": "deny"}
    path = os.path.abspath(folder)
    try:
        if not os.path.isdir(path):
            create_private_dir(path)
    except HarnessIPCError as error:
        reason = error.__cause__.strerror if isinstance(error.__cause__, OSError) else "it is not a private directory"
        raise BrowserNotFound(f"{DOWNLOADS}={folder!a} can't be used: {reason}; set it to a directory of yours") from None
    return {"behavior": "allow", "downloadPath": path}


def has_display(broken: Mapping[str, str] | None = None) -> bool:
    """Return whether a window could be shown: on Linux, on a display that is not `broken` (see `find_broken`)."""
    if sys.platform in ("win32", "darwin"):
        return True
    named = {variable for variable in (X11, WAYLAND) if os.environ.get(variable)}
    return bool(named - (find_broken(os.environ) if broken is None else broken).keys())


def describe_broken_display(broken: Mapping[str, str]) -> str | None:
    """Return the result of `find_broken` as text; None if it is empty."""
    return " and ".join(f"{name}={os.environ[name]} can't be reached ({why})" for name, why in broken.items()) or None


def is_root() -> bool:
    """Return whether this process is root, for whom the browser's sandbox does not work."""
    return sys.platform != "win32" and os.geteuid() == 0


def root_refusal() -> str | None:
    """Return why no browser is started as root, or None if this process is not root, or `HARNESS_CHROME_ROOT` is 1."""
    if not is_root() or os.environ.get(ROOT) == "1":
        return None
    return (
        "no browser is started as root, since its sandbox does not work for root: a page that breaks out of its process would "
        f"be root; run as another user, or set {ROOT}=1 to accept that"
    )

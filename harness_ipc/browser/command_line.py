"""The command line of `harness-browser`."""

from __future__ import annotations

from harness_ipc import __version__, escape_control

from . import NAME, TAB_NAME

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Sequence
    from typing import NoReturn

# Words that are options, not a FILE.
_COMMANDS = ("doctor", "reload")


class Options:
    """The options of a command line: `code` or `file`, by default standard input, and the `arguments` of the program."""

    code: str | None = None
    file: str | None = None
    arguments: Sequence[str] = ()
    doctor = reload = json = new_tab = keep_tab = False
    name: str | None = None
    tab: str | None = None
    tab_name: str | None = None


def parse(words: list[str]) -> Options:
    """Return the options of a command line. Exits with 2 if it is invalid."""
    options = Options()
    # Without argparse in the usual cases: its import takes a fifth of the time of a short program.
    if words[:1] == ["-c"] and len(words) > 1:
        options.code, options.arguments = words[1], words[2:]
    elif not words or words[0] == "-" or not (words[0].startswith("-") or words[0] in _COMMANDS):
        options.file, options.arguments = (words[0] if words else None), words[1:]
    else:
        own, arguments = _split(words)
        parser = _parser()
        parser.parse_args(own, options)
        options.arguments = [*options.arguments, *arguments]
        if (options.doctor or options.reload) and options.file is not None:
            parser.error(f"argument FILE: there is nothing to run with {'--doctor' if options.doctor else '--reload'}")
        if options.json and not options.doctor:
            parser.error("argument --json: only with --doctor")
    return options


def _parser() -> ArgumentParser:
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            """Print usage and exit. `message` may quote untrusted arguments."""
            super().error(escape_control(message))

    parser = Parser(
        prog="harness-browser",
        usage="%(prog)s [--name NAME] [--new-tab | --tab WHICH | --tab-name TAB] [--keep-tab]\n"
        "           (-c CODE | FILE | -) [ARGUMENT ...]\n"
        "       %(prog)s [--name NAME] doctor [--json] | reload | status [--json] | logs [-f]",
        description="Run Python with the browser helpers: page_info(), goto_url(url), js(code), "
        "capture_screenshot(path) and so on. The first run starts the daemon that holds the browser; it keeps running. "
        "doctor, reload, status and logs are commands, not files: ./doctor is a file.",
        epilog="exit status: 0 success; 1 the program raised, or doctor found a failure; 2 usage; 4 timed out; 5 refused; "
        "6 the daemon or its browser could not be started or found; else the exit status of the program",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("-c", dest="code", metavar="CODE", help="run this program; further arguments are passed to it")
    what.add_argument("--doctor", action="store_true", help="diagnose the browser and its daemon")
    what.add_argument("--reload", action="store_true", help="stop the daemon and the browser that it started")
    parser.add_argument("--json", action="store_true", help="print the findings of doctor as JSON")
    parser.add_argument("--name", metavar="NAME", help=f"the daemon's name (default: ${NAME}, then 'browser')")
    tab = parser.add_mutually_exclusive_group()
    tab.add_argument("--new-tab", action="store_true", help="start in a new tab, and close it at the end")
    tab.add_argument("--tab", metavar="WHICH", help="start in this tab: current, an id, or a part of its URL")
    tab.add_argument("--tab-name", metavar="TAB", help=f"start in the tab of this name (default: ${TAB_NAME}); it stays")
    parser.add_argument("--keep-tab", action="store_true", help="keep a tab opened for this run; the next run starts there")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("file", nargs="?", metavar="FILE", help="run the program in this file; default, and -: standard input")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENT", help="arguments of the program")
    return parser


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return the arguments of this command, and those after -c CODE, which belong to the program.

    The words doctor and reload become the options of that name.
    """
    for place, word in enumerate(arguments):
        if place and arguments[place - 1] in ("--name", "--tab", "--tab-name"):
            continue
        if word.startswith("-c"):
            end = place + (2 if word == "-c" else 1)
            return arguments[:end], arguments[end:]
        if word in _COMMANDS:
            return [*arguments[:place], f"--{word}", *arguments[place + 1 :]], []
        if not word.startswith("-") or word in ("-", "--"):
            break
    return arguments, []

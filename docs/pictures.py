"""Draw the pictures of the documentation, light and dark: `python docs/pictures.py`.

With `--tour`, the tour runs first, and the picture of the terminal shows its output.
"""

from __future__ import annotations

import re
import subprocess
import sys
from html import escape
from pathlib import Path

STATIC = Path(__file__).parent / "_static"
TOUR = Path(__file__).parent / "tour.txt"
THEMES = {
    "light": {
        "ground": "#ffffff",
        "text": "#1f2328",
        "muted": "#656d76",
        "line": "#8c959f",
        "box": "#f6f8fa",
        "accent": "#0969da",
    },
    "dark": {
        "ground": "#131416",
        "text": "#e6edf3",
        "muted": "#8d96a0",
        "line": "#6e7681",
        "box": "#1c2128",
        "accent": "#58a6ff",
    },
}
SANS = "system-ui, -apple-system, 'Segoe UI', sans-serif"
MONO = "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"


_OPEN = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img"
 font-family="{sans}" font-size="14">
<title>{title}</title>
<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto-start-reverse">
<path d="M0,0 L8,4 L0,8 z" fill="{line}"/></marker></defs>
<rect width="{width}" height="{height}" rx="8" fill="{ground}"/>"""


class Picture:
    """An SVG image in the colours of one theme."""

    def __init__(self, width: int, height: int, title: str, theme: str) -> None:
        self.colours = THEMES[theme]
        self.parts = [_OPEN.format(width=width, height=height, title=escape(title), sans=SANS, **self.colours)]

    def text(self, x: float, y: float, text: str, *, colour: str = "text", anchor: str = "middle", more: str = "") -> None:
        fill = self.colours[colour]
        self.parts.append(f'<text x="{x:g}" y="{y:g}" fill="{fill}" text-anchor="{anchor}" {more}>{escape(text)}</text>')

    def box(self, x: float, y: float, width: float, height: float, *lines: str, colour: str = "line") -> None:
        """Draw a rectangle with centered lines of text, the first one bold."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{self.colours["box"]}"'
            f' stroke="{self.colours[colour]}" stroke-width="1.5"/>'
        )
        top = y + height / 2 - 9 * (len(lines) - 1) + 5
        for index, line in enumerate(lines):
            bold = "" if index else 'font-weight="600"'
            self.text(x + width / 2, top + 18 * index, line, colour="muted" if index else "text", more=bold)

    def arrow(
        self, path: str, label: str = "", at: tuple[float, float] = (0, 0), *, both: bool = False, dashed: bool = False
    ) -> None:
        start = ' marker-start="url(#arrow)"' if both else ""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="{self.colours["line"]}" stroke-width="1.5"'
            f' marker-end="url(#arrow)"{start}{dash}/>'
        )
        if label:
            self.text(*at, label, colour="muted", more='font-size="12.5"')

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>", ""])


def architecture(theme: str) -> str:
    picture = Picture(760, 300, "Short-lived clients, one authenticated channel, one long-lived daemon", theme)
    for index, (name, what) in enumerate(
        [("a command", "harness-ipc call"), ("a script", "connect_daemon"), ("a web worker", "AsyncClient")]
    ):
        picture.box(20, 36 + 76 * index, 170, 56, name, what)
        picture.arrow(f"M190,{64 + 76 * index} L318,{118 + 22 * index}", both=True)
    picture.text(410, 46, "Unix socket or named pipe", colour="muted", more='font-size="12.5"')
    picture.text(410, 66, "JSON, both sides authenticated", colour="muted", more='font-size="12.5"')
    picture.box(320, 84, 180, 112, "daemon", "event loop, threads", "Service methods", colour="accent")
    picture.box(565, 84, 180, 112, "expensive resource", "a browser, an index,", "a compiler, a model")
    picture.arrow("M500,140 L563,140", both=True)
    picture.box(320, 232, 420, 48, "private directory, 0700", "record: address, key, state · name lock · log")
    picture.arrow("M410,196 L410,230", "writes", (434, 217))
    picture.arrow("M105,244 L105,256 L318,256", "find it by name", (212, 273))
    return picture.svg()


def states(theme: str) -> str:
    picture = Picture(760, 250, "The states of a daemon", theme)
    for x, name, what in [
        (20, "absent", "no daemon"),
        (220, "starting", "start() runs"),
        (420, "running", "it answers"),
        (590, "unresponsive", "blocked or stopped"),
    ]:
        picture.box(
            x, 50, 150 if name == "unresponsive" else 120, 54, name, what, colour="accent" if name == "running" else "line"
        )
    picture.arrow("M140,77 L218,77", "start", (179, 70))
    picture.arrow("M340,77 L418,77", "ready", (379, 70))
    picture.arrow("M540,77 L588,77", both=True)
    picture.text(564, 42, "no answer", colour="muted", more='font-size="12.5"')
    picture.arrow("M280,50 L280,24 L80,24 L80,48", "start failed", (180, 18))
    picture.arrow("M470,104 L470,134 L80,134 L80,106", "idle, stop, signal: drain, then exit", (280, 128))
    picture.box(360, 186, 170, 48, "stale", "a record, no process")
    picture.arrow("M510,104 L510,184", "crash, kill", (546, 160), dashed=True)
    picture.arrow("M665,104 L665,210 L532,210", "kill", (600, 204), dashed=True)
    picture.arrow("M360,210 L50,210 L50,106", "the next start, or stop, removes it", (205, 204))
    return picture.svg()


def request(theme: str) -> str:
    messages = [
        ("read the record: address, key", ""),
        ("challenge", ">"),
        ("proof of the daemon, challenge", "<"),
        ("proof of the client, request", ">"),
        ("the handler runs", "."),
        ("verdict", "<"),
        ("reply", "<"),
        ("keep the connection for the next", ""),
    ]
    picture = Picture(760, 90 + 42 * len(messages), "The life of a request on a new connection", theme)
    picture.box(60, 16, 160, 40, "client")
    picture.box(540, 16, 160, 40, "daemon", colour="accent")
    bottom = 76 + 42 * len(messages)
    for x in (140, 620):
        picture.parts.append(f'<path d="M{x},56 L{x},{bottom}" stroke="{picture.colours["line"]}" stroke-dasharray="3 4"/>')
    for index, (label, way) in enumerate(messages):
        y = 94 + 42 * index
        if way in ("<", ">"):
            start, end = (140, 618) if way == ">" else (620, 142)
            picture.arrow(f"M{start},{y} L{end},{y}", label, (380, y - 7))
        else:
            picture.box(530 if way == "." else 10, y - 17, 180 if way == "." else 260, 30, label)
    return picture.svg()


def tour(theme: str) -> str:
    lines = ["$ python -m harness_ipc demo", *TOUR.read_text(encoding="utf-8").rstrip("\n").split("\n")]
    picture = Picture(760, 34 + 20 * len(lines), "The tour in a terminal", theme)
    for index, line in enumerate(lines):
        colour = "accent" if index == 0 else "text"
        picture.text(
            18,
            34 + 20 * index,
            line,
            colour=colour,
            anchor="start",
            more=f'xml:space="preserve" font-family="{MONO}" font-size="13.5"',
        )
    return picture.svg()


PICTURES = {"architecture": architecture, "request": request, "states": states, "tour": tour}


def give_tour() -> str:
    """Run the tour, and return its output without progress."""
    command = [sys.executable, "-m", "harness_ipc", "demo"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.sub(r"^  clients   \d+/\d+\n", "", text, flags=re.MULTILINE)


def main() -> None:
    if "--tour" in sys.argv:
        TOUR.write_text(give_tour(), encoding="utf-8")
    for name, draw in PICTURES.items():
        for theme in THEMES:
            (STATIC / f"{name}-{theme}.svg").write_text(draw(theme), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Finds the reason why a browser has ended in its standard error, which has many other lines."""

from __future__ import annotations

import re

# [1234:5678:1128/035936.307663:ERROR:ui/ozone/platform/x11/ozone_platform_x11.cc:257] text
_ENTRY = re.compile(r"\[[\d:/.]+:(VERBOSE\d*|INFO|WARNING|ERROR|FATAL):([^\]]*)\] ?(.*)\Z")
_NO_DISPLAY = re.compile(
    r"Missing X server|platform failed to initialize|Authorization required, but no auth|Failed to connect to Wayland|"
    r"(?:can't|cannot|unable to) open (?:X )?display",
    re.IGNORECASE,
)
_KNOWN = re.compile(
    r"Running as root without|No usable sandbox|Failed to move to new namespace|error while loading shared librar|"
    r"cannot open shared object|profile appears to be in use|Failed to create.*(?:ProcessSingleton|SingletonLock)|"
    r"No space left|Out of memory|Cannot allocate",
    re.IGNORECASE,
)
# Usual complaints of Chromium in a container, in a service or without a GPU.
_NOISE = re.compile(
    r"dbus|d-bus|gcm|vaapi|vulkan|libva|angle|/gpu/|/gl/|viz|gtk|fontconfig|\bpci\b|deprecated|google_apis|voice_transcription|"
    r"registration_request|upower|bluetooth|cert_verify|sharedimage|crashpad",
    re.IGNORECASE,
)


def find_reason(text: str) -> str:
    """Return the line with the reason in ASCII, without control characters; empty if there is none."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    entries = [(match[1], match[2], match[3]) if (match := _ENTRY.match(line)) else ("", "", line) for line in lines]
    known = [text for _, _, text in entries if _NO_DISPLAY.search(text) or _KNOWN.search(text)]
    fatal = [text for level, _, text in entries if level == "FATAL"]
    others = [text for level, source, text in entries if level in ("", "ERROR") and not _NOISE.search(f"{source} {text}")]
    # The first known reason causes the later ones.
    chosen = [*known[:1], *fatal[-1:], *others[-1:], *[text for _, _, text in entries][-1:]]
    return ascii(chosen[0] if chosen else "")[1:-1][:300]


def lacks_display(text: str) -> bool:
    """Return whether the browser could not open its display."""
    return _NO_DISPLAY.search(text) is not None

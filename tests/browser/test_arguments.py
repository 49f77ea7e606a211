"""Invalid arguments of helpers: errors in one line that say what to pass. No browser is started."""

from __future__ import annotations

import math
from typing import Any

import pytest

from harness_ipc.browser import helpers

NAN = math.nan
NO_SCHEME = "is not a complete URL: add http:// or https://"
NO_TAB = "target must be a targetId, or a tab as list_tabs() has it, not"


@pytest.mark.parametrize(
    ("helper", "arguments", "error"),
    [
        ("js", (5,), "js(): expression must be str, not int: 5"),
        ("js", ("1", 7), "js(): target_id must be str, not int: 7"),
        ("goto_url", (None,), "goto_url(): url must be str, not NoneType: None"),
        (
            "goto_url",
            ("127.0.0.1:80",),
            f"goto_url(): '127.0.0.1:80' {NO_SCHEME}",
        ),
        (
            "goto_url",
            ("localhost:80/a",),
            f"goto_url(): 'localhost:80/a' {NO_SCHEME}",
        ),
        ("goto_url", ("example.com",), f"goto_url(): 'example.com' {NO_SCHEME}"),
        ("goto_url", ("[::1]:80",), f"goto_url(): '[::1]:80' {NO_SCHEME}"),
        ("goto_url", ("//example.com",), "goto_url(): '//example.com' is not a complete URL: add http:"),
        ("goto_url", ("/tmp/a.html",), "goto_url(): '/tmp/a.html' is not a complete URL: add file://"),
        ("goto_url", ("",), f"goto_url(): '' {NO_SCHEME}"),
        (
            "new_tab",
            ("example.com:80",),
            f"new_tab(): 'example.com:80' {NO_SCHEME}",
        ),
        (
            "switch_tab",
            ({},),
            f"switch_tab(): {NO_TAB} dict: {{}}",
        ),
        ("switch_tab", (3,), f"switch_tab(): {NO_TAB} int: 3"),
        ("close_tab", ("",), f"close_tab(): {NO_TAB} str: ''"),
        ("iframe_target", (5,), "a target must be a selector, a reference such as 'e5', or a CDP node as a dict, not 5"),
        ("click_at_xy", ("1", 2), "click_at_xy(): x must be a number of CSS pixels, not str: '1'"),
        ("click_at_xy", (1, NAN), "click_at_xy(): y must be a number of CSS pixels, not nan"),
        (
            "click_at_xy",
            (1, 2, "thumb"),
            "click_at_xy(): button must be left, middle, right, back, forward, not 'thumb'",
        ),
        ("click_at_xy", (1, 2, "left", "2"), "click_at_xy(): clicks must be a number of clicks, not str: '2'"),
        ("scroll", (1, 2, None), "scroll(): dy must be a number of CSS pixels, not NoneType: None"),
        ("type_text", (5,), "type_text(): text must be str, not int: 5"),
        ("press_key", (5,), "press_key(): key must be str, not int: 5"),
        ("press_key", ("a", "hyper"), "press_key(): there is no modifier 'hyper': pass alt, ctrl, meta or shift"),
        ("press_key", ("a+b",), "press_key(): there is no modifier 'a': pass alt, ctrl, meta or shift"),
        ("press_key", ("a", 16), "press_key(): modifiers must be a sum of 1, 2, 4 and 8, not 16"),
        (
            "press_key",
            ("a", None),
            "press_key(): modifiers must be names such as 'ctrl', or a sum, not NoneType: None",
        ),
        ("handle_dialog", ("yes",), "handle_dialog(): accept must be True or False, not str: 'yes'"),
        ("handle_dialog", (True, 5), "handle_dialog(): text must be str, not int: 5"),
        ("cdp", (5,), "cdp(): method must be str, not int: 5"),
        ("wait", ("1",), "wait(): seconds must be a number of seconds, not str: '1'"),
        ("wait", (-1,), "wait(): seconds must be a number of seconds from 0 on, not -1"),
        ("wait_for_load", ("5",), "wait_for_load(): timeout must be a number of seconds, not str: '5'"),
    ],
)
def test_an_argument_that_can_not_be_used(helper: str, arguments: tuple[Any, ...], error: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        getattr(helpers, helper)(*arguments)
    assert str(caught.value) == error


@pytest.mark.parametrize(
    ("timeout", "kind"),
    [
        (-1, "from 0 on, not -1"),
        (NAN, "from 0 on, not nan"),
        ("5", "not str: '5'"),
        (None, "not NoneType: None"),
        (True, "not bool: True"),
    ],
)
@pytest.mark.parametrize(
    ("helper", "arguments"),
    [
        ("js", ("1",)),
        ("page_info", ()),
        ("goto_url", ("http://a",)),
        ("click", ("#a",)),
        ("click_at_xy", (1, 2)),
        ("press_key", ("a",)),
        ("cookies", ()),
        ("snapshot", ()),
        ("capture_screenshot", ()),
        ("list_tabs", ()),
        ("drain_events", ()),
        ("wait_for_load", ()),
    ],
)
def test_an_invalid_timeout(helper: str, arguments: tuple[Any, ...], timeout: Any, kind: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"timeout must be a number of seconds[ ,]+{kind}$"):
        getattr(helpers, helper)(*arguments, timeout=timeout)

"""`js` in a page of a real browser: values, declarations, exceptions and timeouts."""

from __future__ import annotations

import math

import pytest

from harness_ipc.browser.helpers import BrowserTimeout, CDPError, JavaScriptError, js
from tests.browser.site import Site, visit
from tests.support.marks import needs_chromium
from tests.support.processes import PATIENCE

pytestmark = needs_chromium


def serves() -> bool:
    return bool(js("6 * 7", timeout=PATIENCE) == 42)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1", 1),
        ("1.5", 1.5),
        ("true", True),
        ("'Grüße 🎈'", "Grüße 🎈"),
        ("null", None),
        ("undefined", None),
        ("", None),
        ("({a: [1, {b: null}], c: 'd'})", {"a": [1, {"b": None}], "c": "d"}),
        ("const a = 6; a * 7", 42),
        ("const a = 6; return a * 7", 42),
        ("if (1) { return 'early' } return 'late'", "early"),
        ("Promise.resolve(5)", 5),
        ("new Promise(done => setTimeout(() => done('late'), 1))", "late"),
        ("await Promise.resolve(6)", 6),
        ("await Promise.resolve({a: 1}) // why", {"a": 1}),
        ("const a = await Promise.resolve(6); const b = 7; return a * b", 42),
        ("return await Promise.resolve([1])", [1]),
        ("'return 1; await 2'", "return 1; await 2"),
        ("await Promise.resolve(6);", 6),
        ("await (async () => 7)()", 7),
        ("await -Infinity", -math.inf),
        ("let n = 0; for await (const a of [1, 2]) n += a; return n", 3),
        ("(async () => { await 1; return 2 })()", 2),
        ("async function f() { await 1; return 2 } f()", 2),
        ("0", 0),
        ("-0", -0.0),
        ("NaN", math.nan),
        ("Infinity", math.inf),
        ("-Infinity", -math.inf),
        ("[NaN, Infinity]", [None, None]),
        ("2n ** 70n", 2**70),
        ("-5n", -5),
    ],
)
def test_a_value_of_javascript(empty_page: str, expression: str, value: object) -> None:
    # repr: nan != nan, and -0.0 == 0.
    assert repr(js(expression)) == repr(value)


def test_half_a_pair_of_surrogates(empty_page: str) -> None:
    assert js("'\ud83d'.charCodeAt(0)") == 0xD83D
    assert js("'\\udfff'") == "\udfff"
    assert js("'\ud83d' + '\udc4d'") == "👍"


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("throw new TypeError('not so')", "TypeError: not so"),
        ("missing", "ReferenceError: missing is not defined"),
        ("throw 42", "42"),
        ("throw 'a text'", "a text"),
        ("throw null", "null"),
        ("throw true", "true"),
        ("Promise.reject(new Error('too late'))", "Error: too late"),
        ("Promise.reject('a text')", "a text"),
        ("await Promise.reject(new RangeError('too far'))", "RangeError: too far"),
        ("const a = 1; return a + missing", "ReferenceError: missing is not defined"),
        # Control characters are escaped: the error may be printed on a terminal.
        (
            r"throw '\u001b]52;c;eA==\u0007\u001b[2J\u009b31m\u202e\u2066\ud800\t日'",
            "\\x1b]52;c;eA==\\x07\\x1b[2J\\x9b31m\\u202e\\u2066\\ud800\t日",
        ),
        (r"throw new Error('\r\u007f')", r"Error: \r\x7f"),
    ],
)
def test_javascript_exceptions(empty_page: str, expression: str, text: str) -> None:
    with pytest.raises(JavaScriptError) as caught:
        js(expression)
    assert str(caught.value).splitlines()[0] == text
    assert serves()


@pytest.mark.parametrize("expression", ["a b", "(", "await (", "return ("])
def test_invalid_javascript(empty_page: str, expression: str) -> None:
    with pytest.raises(JavaScriptError, match=r"^SyntaxError: "):
        js(expression)
    assert serves()


@pytest.mark.parametrize(
    "statement",
    [
        "JSON.parse('<')",
        "await new Promise(() => JSON.parse('<'))",
        ("eval('return 1')"),
        ("new Function('await 1')"),
    ],
)
def test_code_with_a_runtime_syntax_error_runs_once(page: str, statement: str) -> None:
    js("window.runs = 0")
    with pytest.raises(JavaScriptError, match=r"^SyntaxError: "):
        js(f"window.runs += 1; {statement}")
    assert js("runs") == 1


@pytest.mark.parametrize(
    "expression",
    [
        "window",
        "await window",
        "(async () => { await 1; return window })()",
        "Symbol('a')",
        "await Symbol('a')",
        "({a: 1n})",
        "const a = {}; a.a = a; a",
    ],
)
def test_a_value_that_can_not_be_carried(empty_page: str, expression: str) -> None:
    with pytest.raises(CDPError, match=r"Runtime\.\w+: Object "):
        js(expression)
    assert serves()


@pytest.mark.parametrize(
    "expression",
    [
        "for (;;);",
        "let n = 0; for (;;) n++",
        "await null; for (;;);",
        "(async () => { await null; for (;;); })()",
        # The timeout of Runtime.evaluate no longer applies after a real wait.
        "await new Promise(done => setTimeout(done, 1)); for (;;);",
    ],
)
def test_code_that_computes_for_too_long_is_ended(empty_page: str, expression: str) -> None:
    with pytest.raises(BrowserTimeout, match=r"^the code ran for more than 1 s, and was terminated$"):
        js(expression, timeout=1)
    assert serves()


@pytest.mark.parametrize("expression", ["new Promise(() => {})", "await new Promise(() => {})"])
def test_a_promise_that_is_never_settled(empty_page: str, expression: str) -> None:
    with pytest.raises(
        BrowserTimeout, match=r"^the code has not finished within 1 s: it waits for a promise that is not settled"
    ):
        js(expression, timeout=1)
    assert serves()


# A scope for each call.


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("const rows = [1, 2]; rows.length", 2),
        ("let rows = 3; rows += 1", 4),
        ("class Row { static size = 5 } Row.size", 5),
        ("const row = await Promise.resolve(6); row", 6),
        ("const row = await Promise.resolve(); ({row: 7}).row", 7),
        ("const row = 8; return row", 8),
        ("const {a: row, ...rest} = {a: 9}; row", 9),
        ("function row() { return limit } const limit = 10; row()", 10),
        ("let n = 0; for (let i = 0; i < 3; i++) n += i", 3),
        ("const n = 2; if (n > 1) { 'more' } else { 'less' }", "more"),
        ("const n = 2; switch (n) { case 2: 'two' }", "two"),
        ("const n = 2; try { JSON.parse('<') } catch { 'caught' }", "caught"),
        ("const n = 2\nn * 3 // a comment", 6),
        ("const n = 2; n * 4; /* a comment */;", 8),
        ("const n = 2\n;[n, n].length\n", 2),
        ("const n = `${ {a: 1}.a }}`; n", "1}"),
        ("const n = 2; {n: 5}", 5),
        ("const n = 2; ({n})", {"n": 2}),
        ("const n = 2; var m = n; function f() {}", None),
        ("const n = 2; n * 5; function f() { return n }", 10),
        ("'use strict'; const n = 2; n * 5; function f() { return n }", 10),
        ("const n = await f(2); n * 5; function f(m) { return m }", 10),
        ("const n = await f(2)\nn * 5\nfunction f(m) {\n  return g(m)\n}\nfunction g(m) { return m }", 10),
        ("'use strict'; const n = await f(2); n * 5; function f(m) { return m }", 10),
        ("'const'", "const"),
    ],
)
def test_declarations_are_the_calls_own(empty_page: str, expression: str, value: object) -> None:
    for _ in range(2):
        assert js(expression) == value
    names = ["rows", "Row", "limit", "n"]
    assert (
        js(f"{names}.filter(name => {{ try {{ return eval('typeof ' + name) != 'undefined' }} catch {{ return true }} }})")
        == []
    )


def test_globals_stay_in_the_page(page: str) -> None:
    js("var one = 1; let other = 2; window.three = 3; four = 4; function five() { return other + 3 }")
    assert js("[one, three, four, five()]") == [1, 3, 4, 5]
    js("var six = await Promise.resolve(6)")
    assert js("six") == 6


def test_this_and_strictness_are_those_of_a_script(page: str) -> None:
    assert js("const a = 1; this === window")
    assert js("const a = await 1; this === window")
    assert js("const a = 1; return this === window")
    js("const a = 1; loose = a")
    assert js("loose") == 1
    for directive in ("'use strict'", '/* why */ // so\n"use strict"', " 'use strict'"):
        with pytest.raises(JavaScriptError, match="ReferenceError: missing is not defined"):
            js(f"{directive}; const a = 1; missing = a")


@pytest.mark.parametrize(
    ("expression", "text", "place"),
    [
        ("missing", "ReferenceError: missing is not defined", (0, 0)),
        ("const a = 1; missing", "ReferenceError: missing is not defined", (0, 13)),
        ("const a = 1;\n\n  missing", "ReferenceError: missing is not defined", (2, 2)),
        ("const a = 1;\nreturn a + missing", "ReferenceError: missing is not defined", (1, 11)),
        ("const a = 1; return a + missing", "ReferenceError: missing is not defined", (0, 24)),
        ("'use strict'; const a = 1; a = 2", "TypeError: Assignment to constant variable.", (0, 29)),
        ("const a = 1;\na b", "SyntaxError: Unexpected identifier 'b'", (1, 2)),
        ("const a = 1;\na(", "SyntaxError: Unexpected end of input", (1, 2)),
        ("const a = 1; function f() { missing } f()", "ReferenceError: missing is not defined", (0, 28)),
        ("const a = 1; function f() { a b }", "SyntaxError: Unexpected identifier 'b'", (0, 30)),
        ("const a = await 1; missing", "ReferenceError: missing is not defined", (0, 19)),
        ("const a = await 1; function f() { missing } f()", "ReferenceError: missing is not defined", (0, 34)),
        ("const a = await 1; function f() {", "SyntaxError: Unexpected end of input", (0, 33)),
        ("const a = await (", "SyntaxError: Unexpected end of input", (0, 17)),
        ("const a = 1; return (", "SyntaxError: Unexpected end of input", (0, 21)),
        ("if (1) {\nlet a", "SyntaxError: Unexpected end of input", (1, 5)),
        ("const a = 1 } { 2", "SyntaxError: ", (0, None)),
        ("const a = 1\n}\n{\n2", "SyntaxError: ", (2, None)),
        ("return 1 }); (() => {", "SyntaxError: ", (0, None)),
        ("let a = 1; let a = 2", "SyntaxError: Identifier 'a' has already been declared", (0, 15)),
    ],
)
def test_an_error_names_the_place_in_the_code(
    empty_page: str, expression: str, text: str, place: tuple[int, int | None]
) -> None:
    with pytest.raises(JavaScriptError) as caught:
        js(expression)
    assert str(caught.value).startswith(text)
    line, column = place
    assert caught.value.data["line"] == line
    assert column in (None, caught.value.data["column"])


@pytest.mark.parametrize(
    "expression",
    [
        "document.title",
        "const a = document.title; a",
        "const a = await document.title; a",
        "const a = document.title; return a",
    ],
)
def test_a_page_that_forbids_scripts(used_page: str, site: Site, expression: str) -> None:
    visit(f"{site.url}/strict")
    assert js(expression) == "Strict"


def test_a_page_that_has_its_own_eval(page: str) -> None:
    js("window.eval = () => 'mine'")
    assert js("const a = (function () { return 3 })(); a") == 3


def test_code_runs_with_user_activation(page: str) -> None:
    for expression in ("let a; a = navigator.userActivation.isActive", "await 1; navigator.userActivation.isActive"):
        assert js(expression) is True


@pytest.mark.parametrize("wrong", [5, None, b"1", ["1"]])
def test_code_must_be_text(wrong: object) -> None:
    with pytest.raises(TypeError, match=r"^js\(\): expression must be str, not \w+: "):
        js(wrong)  # type: ignore[arg-type]

"""Tabs as objects, and the helpers as the functions of a default one."""

from __future__ import annotations

import inspect
import pydoc
import subprocess
import sys

import pytest

from harness_ipc.browser import helpers
from harness_ipc.browser.tab import Tab
from tests.support.processes import PATIENCE

FUNCTIONS = [name for name in helpers.__all__ if callable(getattr(Tab, name, None))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_helper_is_documented_as_its_method(name: str) -> None:
    method, helper = getattr(Tab, name), getattr(helpers, name)
    first, *others = inspect.signature(method).parameters.values()
    assert first.name in ("self", "tab")
    assert list(inspect.signature(helper).parameters.values()) == others
    summary = inspect.getdoc(method)
    assert summary
    page = pydoc.plain(pydoc.render_doc(helper))
    assert f"{name}(" in page
    assert summary.splitlines()[0] in page


def test_importing_the_helpers_imports_no_more_than_page_info_needs() -> None:
    program = (
        "import sys; from harness_ipc.browser.helpers import *; "
        "heavy = 'asyncio dataclasses logging subprocess tempfile typing'.split(); "
        "deferred = 'dialogs keyboard mouse screenshot _files'.split(); "
        "print([name for name in heavy + [f'harness_ipc.browser.{name}' for name in deferred] if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    assert (run.stdout, run.stderr) == ("[]\n", "")

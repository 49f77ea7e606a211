from __future__ import annotations

from harness_ipc.browser.helpers import goto_url, page_info, wait_for_load
from tests.browser.site import Site
from tests.marks import needs_chromium

pytestmark = needs_chromium


def test_page(page: str, site: Site) -> None:
    goto_url(f"{site.url}/form")
    assert wait_for_load()
    assert page_info()["title"] == "A form"


def test_fresh(fresh: object, site: Site) -> None:
    goto_url(f"{site.url}/")
    assert wait_for_load()
    assert page_info()["title"] == "Home"

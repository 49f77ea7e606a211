"""Patterns of addresses: parts and globs."""

from __future__ import annotations

import pytest

from harness_ipc.browser.url_pattern import compile_url_pattern


@pytest.mark.parametrize(
    ("pattern", "url", "fits"),
    [
        ("/orders", "https://example.org/orders?page=2", True),
        ("/orders?page", "https://example.org/orders?page=2", True),
        ("example.org", "https://example_org/", False),
        ("**/orders/*", "https://example.org/shop/orders/7", True),
        ("**/orders/*", "https://example.org/orders/7/lines", False),
        ("https://*/orders", "https://example.org/orders", True),
        ("https://*/orders", "https://example.org/orders?page=2", False),
        ("https://*/orders", "https://example.org/shop/orders", False),
        ("https://example.org/**", "https://example.org/", True),
        ("**", "about:blank", True),
        ("*.org/(a)", "https://example.org/(a)", False),
        ("**.org/(a)", "https://example.org/(a)", True),
    ],
)
def test_patterns(pattern: str, url: str, fits: bool) -> None:
    assert bool(compile_url_pattern(pattern).search(url)) is fits

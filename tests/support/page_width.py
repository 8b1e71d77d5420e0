"""How wide a page is in a browser: for the tests of pages."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

_OVER = "(node) => node.scrollWidth > node.clientWidth"
_WIDE = f"""return [document.documentElement, ...document.querySelectorAll(".scroll, .panel")]
    .filter({_OVER}).map((node) => node.className + ": " + node.textContent.slice(0, 60))"""
_PAGE = f"return ({_OVER})(document.documentElement)"


def opened(browser: Any, page: Path, width: int) -> None:
    """Show a page in a window of this width in pixels; a narrow one is a phone's."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.resolve().as_uri())


def wide_parts(browser: Any) -> list[str]:
    """Parts of the page, and the page itself, that scroll sideways."""
    return browser.execute_script(_WIDE)


def scrolls_sideways(browser: Any) -> bool:
    """Tell whether the page itself does; a wide table inside may scroll in its own box."""
    return browser.execute_script(_PAGE)


def panels(browser: Any) -> list[tuple[float, float, float]]:
    """(left, top, width) of each panel of the stacked figures that is shown, from the top."""
    boxes = """return [...document.querySelectorAll(".stacked > svg")].map((node) => node.getBoundingClientRect())
        .filter((box) => box.width).map((box) => [box.left, box.top, box.width])"""
    return [tuple(box) for box in browser.execute_script(boxes)]


def assert_fits(browser: Any, page: Path, stacked: int) -> None:
    """At 1280 pixels nothing scrolls sideways; on a phone the page does not, and its panels are a column."""
    opened(browser, page, 1280)
    assert wide_parts(browser) == []
    assert panels(browser) == []
    opened(browser, page, 390)
    assert not scrolls_sideways(browser)
    places = panels(browser)
    assert len(places) == stacked
    assert len({left for left, _, _ in places}) <= 1
    assert all(below >= above + 100 for (_, above, _), (_, below, _) in pairwise(places))
    assert all(250 < width <= 390 for _, _, width in places)

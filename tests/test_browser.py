"""The report in a real browser: drawn whole, quiet, alone, readable on paper, in the dark and on a phone."""

import re
import zlib

import pytest
from browser import CHROMIUM, DRIVER, Browser
from made_run import make_run
from test_report import FIGURES, attack

from sdpo_eval.report import Report

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with chromedriver on the path"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    return Report(make_run(tmp_path_factory.mktemp("made") / "run")).save().as_uri()


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory) -> str:
    return Report(attack(make_run(tmp_path_factory.mktemp("hostile") / "run"))).save().as_uri()


@pytest.fixture(scope="module")
def browser(page):
    with Browser() as browser:
        browser.open(page)
        yield browser


def drawn(browser: Browser) -> set[str]:
    script = "return [...document.querySelectorAll('figure[data-drawn=yes]')].map((f) => f.id)"
    return {name.removeprefix("figure-") for name in browser.run(script)}


def test_every_figure_is_drawn_and_nothing_is_asked_for_or_complained_of(page):
    with Browser() as browser:
        browser.open(page)
        assert drawn(browser) == FIGURES
        count = "(figure) => figure.querySelectorAll('path[d]').length"
        assert min(browser.run(f"return [...document.querySelectorAll('figure')].map({count})")) > 3
        assert browser.run("return document.documentElement.dataset.errors ?? null") is None
        assert browser.console() == []
        assert browser.requests() == {page}


def test_a_hostile_run_is_drawn_and_runs_nothing(hostile_page):
    with Browser() as browser:
        browser.open(hostile_page)
        assert drawn(browser) == FIGURES
        root = browser.run("return {...document.documentElement.dataset}")
        assert root == {"ready": "yes"}  # no data-hacked, no data-errors
        browser.point_at("#figure-length_confound .mark-symbol path", 0)
        said = browser.wait_for("return document.querySelector('#vg-tooltip-element.visible')?.innerHTML")
        assert not re.search(r"<(script|img|b|a)\b", said)
        assert browser.run("return document.documentElement.dataset.hacked ?? null") is None
        assert browser.requests() == {hostile_page}
        assert browser.console() == []


def test_hovering_a_mark_shows_the_pair_with_its_text(browser):
    browser.point_at("#figure-length_confound .mark-symbol path", 5)
    said = browser.wait_for("return document.querySelector('#vg-tooltip-element.visible')?.innerText")
    for word in ("pair_id", "source", "prompt", "chosen", "rejected", "difficulty"):
        assert word in said


def test_hovering_a_question_shows_it(browser):
    browser.point_at("#figure-items .mark-symbol path", 3)
    said = browser.wait_for("return document.querySelector('#vg-tooltip-element.visible')?.innerText")
    assert "question" in said
    assert "became" in said or "both" in said or "no one right answer" in said


def test_a_click_on_a_head_sorts_by_value_and_a_second_one_turns_round(browser):
    values = "return [...document.querySelectorAll('#table-scores tbody tr')].map((r) => r.cells[1].dataset.v)"
    before = browser.run(values)
    assert len(before) == 5
    browser.point_at("#table-scores thead button", 1, click=True)
    upward = browser.run(values)
    assert upward == sorted(before, key=lambda v: (v == "", float(v or 0)))
    assert (
        browser.run("return document.querySelectorAll('#table-scores th')[1].getAttribute('aria-sort')") == "ascending"
    )
    browser.point_at("#table-scores thead button", 1, click=True)
    assert browser.run(values) == sorted(before, key=lambda v: (v == "", -float(v or 0)))  # what is none stays last


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_paper(page, scheme):
    with Browser(scheme=scheme) as browser:
        browser.open(page)
        script = "const s = getComputedStyle(document.querySelector('%s')); return s.%s"
        paper = browser.run(script % (":root", "backgroundColor"))
        for css in ("p", "figcaption", "thead button", ".loud", ".table small", "summary"):
            ground = browser.run(script % (css, "backgroundColor"))
            ground = paper if ground == "rgba(0, 0, 0, 0)" else ground
            assert contrast(browser.run(script % (css, "color")), ground) >= 4.5, css  # WCAG 2.2, 1.4.3
        fill = browser.run(script % ("#figure-definitions .mark-text text", "fill"))
        assert contrast(fill, paper) >= 4.5


def test_nothing_is_wider_than_a_phone(page):
    with Browser(phone=390) as browser:
        browser.open(page)
        browser.run("document.querySelectorAll('details').forEach((d) => { d.open = true })")
        assert browser.run("return document.documentElement.scrollWidth") <= 390
        right = "(drawing) => drawing.getBoundingClientRect().right"
        assert max(browser.run(f"return [...document.querySelectorAll('figure svg')].map({right})")) <= 391
        assert drawn(browser) == FIGURES


def test_it_prints_with_what_was_folded(browser):
    pdf = browser.printed()
    assert pdf.startswith(b"%PDF")
    pages = len(re.findall(rb"/Type\s*/Page\b", pdf + b"".join(inflated(pdf))))
    assert 6 < pages < 60


def inflated(pdf: bytes) -> list[bytes]:
    found = []
    for stream in re.findall(rb"stream\r?\n(.*?)endstream", pdf, re.DOTALL):
        try:
            found.append(zlib.decompressobj().decompress(stream))
        except zlib.error:
            continue
    return found


def contrast(one: str, two: str) -> float:
    """Contrast of two CSS colours, from 1 to 21. Source: WCAG 2.2, relative luminance."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    lights = sorted((luminance(one), luminance(two)))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def test_contrast_by_hand():
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert contrast("rgb(9, 9, 9)", "rgb(9, 9, 9)") == pytest.approx(1)

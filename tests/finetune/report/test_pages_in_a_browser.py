"""Every HTML page that we write, in headless Chromium: at 1280 and 375 px, light and dark, nothing overflows, fails or is fetched.

Without Chromium these tests are skipped; in CI (`CI=true`) they fail instead.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser

from finetune.report.svg_chart import SCRIPT, STYLE, Series, chart_html
from launch.cli import main
from runtime.page import write_page

WIDTHS = (1280, 375)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(reported, drawn, tmp_path_factory) -> dict[str, Path]:
    """A page of each kind, by name."""
    folder, test = tmp_path_factory.mktemp("pages"), str(drawn / "test")
    run = Path(shutil.copytree(reported, folder / "a_run_with_an_unusually_long_name_that_has_no_space_in_it_at_all"))
    sick = {"step": 3, "reason": "the gradient is not finite", "loss": 4.5, "gradient_norm": "inf", "in_a_row": 1}
    sick["ranks"] = [{"loss": 4.5, "keys": ["shard-000001/" + "x" * 80]}]
    (run / "sick_steps.jsonl").write_text(json.dumps(sick) + "\n")
    evaluate = ["evaluate", "--checkpoint", str(run), "--data", test, "--dataset", "shapes", "--split", "test"]
    heads = ["--heads", "[dual,fusion]", "--save_scores", "true", "--device", "cpu"]
    assert main([*evaluate, *heads, "--out", str(run / "scores.json")]) == 0
    compare = ["compare", str(run / "scores.json"), str(run / "scores-fusion.json"), "--data", test]
    index = ["--checkpoint", str(run), "--data", test, "--out", str(folder / "index"), "--device", "cpu"]
    search = ["search", "a red circle " * 12, "--index", str(folder / "index")]
    commands = {
        "run": ["report", str(run), "--limit", "24", "--out"],
        "comparison": ["report", str(run), str(reported), "--out"],
        "search": [*search, "--html"],
        "flips": [*compare, "--page"],
        "shards": ["inspect", test, "--html"],
    }
    assert main(["index", *index]) == 0
    for name, command in commands.items():
        assert main([*command, str(folder / f"{name}.html")]) == 0, name
    return {name: folder / f"{name}.html" for name in commands}


@pytest.mark.parametrize("name", ["run", "comparison", "search", "flips", "shards"])
def test_a_page_fits_the_window_and_is_silent(browser, pages, name):
    backgrounds = []
    for dark in (False, True):
        for width in WIDTHS:
            sight = browser.look(pages[name], width, dark)
            assert sight.problems == []
            # Keys of recipes and the like are folded away at first; unfolded they must fit, too.
            browser.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
            assert browser.overflow() == ""
        backgrounds.append(sight.background)
    assert backgrounds == ["rgb(246, 247, 249)", "rgb(15, 19, 26)"]
    assert browser.look(pages[name], 720, dark=True, media="print").background == "rgb(255, 255, 255)", "paper is white"


def test_a_chart_is_read_off_under_the_pointer(browser, pages):
    browser.look(pages["run"], 1280)
    logged = [
        json.loads(line) for line in (_run(pages) / "metrics.jsonl").read_text().splitlines() if "train/loss" in line
    ]
    chart = "[...document.querySelectorAll('.chart')].find(c => c.textContent.startsWith('Loss'))"
    reading = f"[{chart}.querySelector('output').textContent, {chart}.querySelector('.keys b').textContent]"
    assert browser.evaluate(reading) == ["", f"{logged[-1]['train/loss']:.5g}"], "at rest the last value"
    for number, share in enumerate((0.15, 0.35, 0.56, 0.77, 0.96)):
        move = "const box = svg.getBoundingClientRect(); svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + "
        browser.evaluate(f"(svg => {{ {move} {share} * box.width}})) }})({chart}.querySelector('svg'))")
        assert browser.evaluate(reading) == [f"step {number + 1}", f"{logged[number]['train/loss']:.5g}"]
    browser.evaluate(f"{chart}.querySelector('svg').dispatchEvent(new PointerEvent('pointerleave'))")
    assert browser.evaluate(reading)[0] == ""


def test_a_curve_that_has_ended_has_no_value_under_the_pointer(browser, tmp_path):
    series = [Series("long", [(0, 1.0), (100, 2.0)]), Series("short", [(0, 3.0), (50, 4.0)], 1)]
    write_page(tmp_path / "page.html", "t", [chart_html("t", series), f"<script>{SCRIPT}</script>"], STYLE)
    assert browser.look(tmp_path / "page.html").problems == []
    read = []
    for share in (0.1, 0.55, 0.99):
        move = f"new PointerEvent('pointermove', {{clientX: box.left + {share} * box.width}})"
        browser.evaluate(
            f"(svg => {{ const box = svg.getBoundingClientRect(); svg.dispatchEvent({move}) }})(document.querySelector('svg'))"
        )
        read.append(browser.evaluate("[...document.querySelectorAll('output, .keys b')].map(e => e.textContent)"))
    # At step 50, where the short curve ends, the long one shows the nearer of its two points, or the first of two as near.
    assert read == [["step 0", "1", "3"], ["step 50", "1", "4"], ["step 100", "2", "–"]]


def test_a_chart_shows_one_axis_at_a_time(browser, pages):
    browser.look(pages["run"], 1280)
    chart = "[...document.querySelectorAll('.chart')].find(c => c.querySelector('input'))"
    shown = f"['linear', 'logarithmic'].map(k => getComputedStyle({chart}.querySelector('.' + k)).display !== 'none')"
    before = browser.evaluate(shown)
    assert sorted(before) == [False, True]
    browser.evaluate(f"{chart}.querySelector('input').click()")
    assert browser.evaluate(shown) == before[::-1]


def _run(pages: dict[str, Path]) -> Path:
    """Return the folder of the run that the pages are about."""
    (path,) = pages["run"].parent.glob("a_run_*")
    return path


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("<div style='width: 2000px'>wide</div>", "too wide"),
        ("<div style='position: relative; left: 1250px; width: 100px'>far</div>", "too wide"),
        ("<script>console.error('no')</script>", "console.error"),
        ("<script>missing()</script>", "a script failed"),
        ("<img src='missing.png'>", "it fetches"),
    ],
)
def test_the_browser_notices_what_is_wrong(browser, tmp_path, body, problem):
    write_page(tmp_path / "page.html", "wrong", [body])
    assert problem in " ".join(browser.look(tmp_path / "page.html").problems)
    write_page(tmp_path / "page.html", "right", ["<p>all is well</p>"])
    assert browser.look(tmp_path / "page.html").problems == []


def test_a_page_that_is_missing_is_no_page_without_faults(browser, tmp_path):
    with pytest.raises(AssertionError, match="ERR_FILE_NOT_FOUND"):
        browser.look(tmp_path / "no_such_page.html")

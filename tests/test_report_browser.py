"""The report in a real browser: it works, the console stays empty, and nothing is fetched.

Needs Chromium or Chrome, found in the PATH or named by the variable CHROMIUM.
"""

import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from snippets import ROOT, run

from trak_dropout.demo import Digits
from trak_dropout.report import Examples, write
from trak_dropout.store import FeatureFiles

playwright = pytest.importorskip("playwright.sync_api")

BROWSER = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no browser: install chromium, or set CHROMIUM to the path of one"
)

HOSTILE = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'>"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER)
        yield browser
        browser.close()


class Visit:
    """A page that is opened, and what went wrong on the way."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        context = browser.new_context(viewport={"width": 1120, "height": 900}, **options)
        self.page = context.new_page()
        self.problems: list[str] = []
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: self.problems.append("a dialog"))
        self.page.on("requestfailed", lambda request: self.problems.append(request.url))
        self.requests: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())
        self.file = file

    def numbers(self) -> list[int]:
        cards = self.page.locator("#gallery button").all()
        return [int(card.get_attribute("data-index")) for card in cards]

    def finish(self) -> None:
        assert self.problems == []
        outside = [url for url in self.requests if not url.startswith("data:")]
        assert outside == [self.file.as_uri()]
        self.page.context.close()


def feature_files(folder: Path, n: int) -> FeatureFiles:
    """Results of TRAK for n samples, as its saver leaves them on disk."""
    random = np.random.default_rng(0)
    (folder / "0").mkdir(parents=True)
    (folder / "metadata.json").write_text("{}")
    (folder / "id_0.json").write_text('{"0": {"is_featurized": 1}}')
    np.save(folder / "0/grads", random.normal(size=(n, 16)).astype(np.float32))
    np.save(folder / "0/out_to_loss", np.ones((n, 1), np.float32))
    np.save(folder / "0/_is_featurized", np.ones(n, np.int32))
    for file in (folder / "0").glob("*.npy"):
        file.rename(file.with_suffix(".mmap"))
    return FeatureFiles(folder)


def content(page: Any) -> dict[str, Any]:
    return json.loads(page.locator("#content").text_content())


def test_the_demo(chromium: Any, demo_results: Path) -> None:
    file = demo_results / "report.html"
    assert file.stat().st_size < 5e6
    visit = Visit(chromium, file)
    page, shown = visit.page, content(visit.page)
    by_rank = [s["index"] for s in sorted(shown["samples"], key=lambda s: s["rank"])]
    assert visit.numbers() == by_rank[:60]
    assert page.locator("#count").text_content() == "1,000 of 1,000 training samples"

    page.select_option("#sort", "trusted")
    assert visit.numbers() == by_rank[::-1][:60]
    page.select_option("#sort", "index")
    assert visit.numbers() == list(range(60))
    page.click("#next")
    assert visit.numbers() == list(range(60, 120))
    page.select_option("#sort", "suspect")

    page.select_option("#label", "=3")
    threes = [s for s in shown["samples"] if s["label"] == "3"]
    assert visit.numbers() == [i for i in by_rank if i in {s["index"] for s in threes}][:60]
    page.select_option("#known", "wrong")
    wrong = {s["index"] for s in threes if s["truth"] != "3"}
    assert 0 < len(wrong) < 60
    assert visit.numbers() == [i for i in by_rank if i in wrong]
    page.select_option("#label", "")
    page.select_option("#known", "")
    page.fill("#search", str(by_rank[500]))
    assert by_rank[500] in visit.numbers()
    page.fill("#search", "nothing has this text")
    assert visit.numbers() == []
    assert page.locator("#count").text_content().startswith("0 of")
    page.fill("#search", "")

    assert page.locator(".target").count() == 5
    assert page.locator(".target .help button").count() == 25
    assert page.locator(".target .spark").count() == 50
    assert page.locator("figure.plot svg").count() == 4
    visit.finish()


def test_pictures_are_those_of_the_samples(chromium: Any, demo_results: Path) -> None:
    """What is on the screen is the digit, pixel by pixel."""
    visit = Visit(chromium, demo_results / "report.html")
    data = Digits.load(0)
    for place in (0, 1, 23, 59):
        card = visit.page.locator("#gallery button").nth(place)
        index = int(card.get_attribute("data-index"))
        shot = Image.open(io.BytesIO(card.locator(".picture").screenshot())).convert("L")
        middles = (np.arange(8) * 2 + 1) * shot.width // 16
        seen = np.asarray(shot)[np.ix_(middles, middles)] / 255
        assert np.abs(seen - data.train_images[index, 0].numpy()).max() < 0.1
    visit.finish()


def test_keyboard_alone(chromium: Any, demo_results: Path) -> None:
    visit = Visit(chromium, demo_results / "report.html")
    page, order = visit.page, visit.numbers()

    def focused() -> str | None:
        return page.evaluate("document.activeElement.dataset.index")

    page.locator("#next").focus()
    page.keyboard.press("Tab")
    assert focused() == str(order[0])  # the gallery is one stop
    page.keyboard.press("ArrowRight")
    assert focused() == str(order[1])
    page.keyboard.press("m")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    assert focused() == str(order[1])
    page.keyboard.press("Enter")
    assert page.locator("#detail").get_attribute("open") is not None
    assert page.locator("#detail-title").text_content() == f"Training sample {order[1]}"
    page.keyboard.press("ArrowRight")
    assert page.locator("#detail-title").text_content() == f"Training sample {order[2]}"
    page.keyboard.press("m")
    page.keyboard.press("Escape")
    assert page.locator("#detail").get_attribute("open") is None
    marked = ", ".join(map(str, sorted(order[1:3])))
    assert page.locator("#marks-list").input_value() == marked
    page.select_option("#marked", "yes")
    assert visit.numbers() == order[1:3]
    page.select_option("#marked", "")
    page.locator("#gallery button").first.focus()
    page.keyboard.press("PageDown")
    assert focused() == str(visit.numbers()[0]) != str(order[0])
    visit.finish()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessible_in_light_and_dark(chromium: Any, demo_results: Path, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    visit = Visit(chromium, demo_results / "report.html", color_scheme=scheme)
    for state in ("closed", "open"):
        if state == "open":
            visit.page.locator("#gallery button").first.click()
        found = axe.run(visit.page).response["violations"]
        assert [(v["id"], v["nodes"][0]["html"][:200]) for v in found] == []
    visit.finish()


def test_a_language_model(chromium: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(ROOT / "docs/language_model.md")
    visit = Visit(chromium, tmp_path / "report.html")
    page = visit.page
    page.fill("#search", "logging")
    labels = page.locator("#gallery .label").all_text_contents()
    texts = page.locator("#gallery .clamp").all_text_contents()
    assert labels
    assert all("logging" in f"{a} {b}".lower() for a, b in zip(labels, texts, strict=True))
    page.fill("#search", "")
    page.select_option("#label", "=csv")
    assert set(page.locator("#gallery .label").all_text_contents()) == {"csv"}
    page.locator("#gallery button").first.click()
    index = int(page.locator("#detail-title").text_content().rpartition(" ")[2])
    assert page.locator("#detail pre").text_content() == names["texts"][index]
    visit.finish()


def test_hostile_content_is_shown_as_text(chromium: Any, tmp_path: Path) -> None:
    def render(i: int) -> Any:
        if i == 0:
            return {HOSTILE: HOSTILE, "second": "javascript:alert(1)"}
        if i == 1:
            raise ValueError(HOSTILE)
        if i == 2:
            return torch.full((3, 4, 4), float("nan"))
        return f"{i}" + HOSTILE + "x" * 1_000_000 + "\ud800\u202e\u2028\x00{{ 7 * 7 }}"

    data = Examples(
        list(range(40)),
        labels=[f"{i % 3}{HOSTILE}" for i in range(40)],
        true_labels=[f"{i % 2}{HOSTILE}" for i in range(40)],
        render=render,
    )
    file = tmp_path / "report.html"
    write(feature_files(tmp_path / "store", 40), file, data, title=HOSTILE, summary=HOSTILE)
    visit = Visit(chromium, file)
    page = visit.page
    assert page.locator("h1").text_content() == HOSTILE
    assert page.evaluate("window.broken") is None
    page.fill("#search", "onerror")
    for card in range(5):
        page.locator("#gallery button").nth(card).click()
        page.keyboard.press("Escape")
    page.select_option("#label", index=1)
    page.select_option("#sort", "label")
    assert page.locator("#gallery .label").first.text_content().startswith("0</script>")
    assert page.evaluate("window.broken") is None
    assert page.locator("img").count() == page.locator("body iframe").count() == 0
    assert page.evaluate("document.scripts.length") == 2
    # Even a script that had got in would not run, nor reach anybody.
    page.evaluate(
        "s => document.body.insertAdjacentHTML('beforeend', s)",
        "<img src=x onerror='window.broken=1'>",
    )
    page.evaluate("() => { const s = document.createElement('script');"
                  "s.textContent = 'window.broken = 1'; document.body.append(s); }")  # fmt: skip
    assert page.evaluate("window.broken") is None
    refused = visit.problems
    assert refused
    assert all("Content Security Policy" in text or text.endswith("/x") for text in refused)
    page.context.close()


def test_ten_thousand_examples(chromium: Any, tmp_path: Path) -> None:
    n = 10_000
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (n, 1, 12, 12)).astype(np.uint8)
    data = Examples([(image, i % 10) for i, image in enumerate(images)])
    file = tmp_path / "report.html"
    write(feature_files(tmp_path / "store", n), file, data)
    assert file.stat().st_size < 5e6
    visit = Visit(chromium, file)
    page = visit.page
    assert page.locator("#count").text_content() == "10,000 of 10,000 training samples"
    assert page.locator("#gallery button").count() == 60
    page.select_option("#label", "=7")
    assert page.locator("#count").text_content() == "1,000 of 10,000 training samples"
    page.select_option("#sort", "index")
    assert visit.numbers() == list(range(7, 600, 10))
    page.fill("#search", "9997")
    assert visit.numbers() == [9997]
    visit.finish()

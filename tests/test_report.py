"""The page: self-contained, and nothing in it is run."""

import re

import numpy as np

from trak_dropout.report import Example, Report, Target, render

HOSTILE = "<script>alert(1)</script>"


def page() -> str:
    image = np.arange(64.0).reshape(8, 8)
    wrong = Example(image, "training image 3", HOSTILE, "5", 0.25)
    right = Example(image, "training image 4", "5", "5", -0.5)
    return render(
        Report(
            title=f"A {HOSTILE}",
            summary=HOSTILE,
            table_head=["method", "AUC"],
            table=[["ours", HOSTILE]],
            table_note=HOSTILE,
            curves={"ours": np.linspace(0, 1, 50)},
            flagged=[wrong, right],
            targets=[Target(Example(image, "test image 0", "5"), [right], [wrong])],
        )
    )


def test_fetches_nothing() -> None:
    addresses = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\')\s>]+)', page())
    assert addresses
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in addresses)


def test_texts_are_escaped() -> None:
    assert HOSTILE not in page()
    assert page().count("&lt;script&gt;") >= 5


def test_shows_what_it_was_given() -> None:
    text = page()
    assert 'class="wrong"' in text
    assert "is 5" in text
    assert "0.2500" in text
    assert "-0.5000" in text
    assert 'alt="training image 4, labeled 5"' in text
    assert "<svg" in text
    assert "most helpful" in text

"""Take the documentation's pictures of reports: ``python docs/screenshots.py DEMO_RESULTS``.

DEMO_RESULTS is the directory that ``make demo`` wrote. The text run is that of language_model.md.
Needs Chromium, found in the PATH or named by the variable CHROMIUM.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

DOCS = Path(__file__).resolve().parent


def main() -> None:
    """Write demo.png and report_text.png beside this file."""
    demo = Path(sys.argv[1]).resolve() / "report.html"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        names: dict[str, object] = {}
        text = (DOCS / "language_model.md").read_text()
        for snippet in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            exec(snippet, names)
        browser = os.environ.get("CHROMIUM") or shutil.which("chromium")
        with sync_playwright() as playwright:
            chromium = playwright.chromium.launch(executable_path=browser)
            page = chromium.new_page(viewport={"width": 1120, "height": 2250})
            page.goto(demo.as_uri())
            page.screenshot(path=DOCS / "demo.png")
            page.goto((Path(folder) / "report.html").as_uri())
            box = page.locator("#targets").bounding_box()
            assert box is not None
            page.screenshot(
                path=DOCS / "report_text.png", clip=box | {"height": 1400}, full_page=True
            )
            chromium.close()


if __name__ == "__main__":
    main()

"""What a person looks at: one self-contained HTML page."""

from trak_dropout.report.page import Example, Report, Target, render

__all__ = ["Example", "Report", "Target", "render"]

"""What a person looks at: one self-contained HTML page. Needs ``trak_dropout[report]``."""

from trak_dropout.report.examples import Example, Examples
from trak_dropout.report.page import Table
from trak_dropout.report.writing import write

__all__ = ["Example", "Examples", "Table", "write"]

"""One self-contained HTML page about a pair: the verdict first, then what it rests on."""

from mergeid.reporting.page.content import FileRecord, Measured, Report
from mergeid.reporting.page.render import render, write_page
from mergeid.reporting.page.results import report_of

__all__ = ["FileRecord", "Measured", "Report", "render", "report_of", "write_page"]

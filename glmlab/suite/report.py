"""The notebooks as one document for readers: HTML that needs no other file, or a PDF printed from it."""

from glmlab.suite.report_document import ReportError, report_html
from glmlab.suite.report_printing import find_browser, print_pdf, write_report

__all__ = ["ReportError", "find_browser", "print_pdf", "report_html", "write_report"]

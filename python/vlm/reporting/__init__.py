"""Reports of runs: one self-contained HTML page."""

from vlm.reporting.page import render, write_report
from vlm.reporting.record import RunRecord, read_run

__all__ = ["RunRecord", "read_run", "render", "write_report"]

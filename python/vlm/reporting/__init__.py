"""Reports of runs: one self-contained HTML page, and the card of the model."""

from vlm.reporting.model_card import render_card, write_card
from vlm.reporting.page import render, write_report
from vlm.reporting.record import RunRecord, read_run

__all__ = ["RunRecord", "read_run", "render", "render_card", "write_card", "write_report"]

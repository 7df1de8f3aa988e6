"""Output of a run for people: picture grids, tables, one HTML page."""

from vq4dit_jax.progress import progress
from vq4dit_jax.reporting.grids import write_comparison, write_grid
from vq4dit_jax.reporting.report import ReportData, write_report
from vq4dit_jax.reporting.table import markdown

__all__ = ["ReportData", "markdown", "progress", "write_comparison", "write_grid", "write_report"]

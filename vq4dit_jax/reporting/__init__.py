"""What a run leaves for people to look at: picture grids, one HTML page, progress bars."""

from vq4dit_jax.progress import progress
from vq4dit_jax.reporting.grids import write_comparison, write_grid
from vq4dit_jax.reporting.report import ReportData, write_report
from vq4dit_jax.reporting.table import markdown

__all__ = ["ReportData", "markdown", "progress", "write_comparison", "write_grid", "write_report"]

"""The figures of a report: each entry takes records, and gives plots without state, display or files."""

from jaxunlearn.report.drawing import Plot
from jaxunlearn.report.plots_audit import audit_plots
from jaxunlearn.report.plots_board import board_plots
from jaxunlearn.report.plots_run import run_plots
from jaxunlearn.report.plots_speed import speed_plots

__all__ = ["Plot", "audit_plots", "board_plots", "run_plots", "speed_plots"]

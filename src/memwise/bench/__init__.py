"""Measure recall, bytes and time: every method beside its baseline and its controls."""

from memwise.bench.engine import Comparison, Report, Row, bench, check, paired_interval

__all__ = ["Comparison", "Report", "Row", "bench", "check", "paired_interval"]

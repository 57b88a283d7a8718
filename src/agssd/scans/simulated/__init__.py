"""Simulated cohorts, deformed and degraded copies of one real scan."""

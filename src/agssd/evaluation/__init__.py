"""Probes, metrics and statistics, shared by callbacks, tasks and commands."""

"""Defences side by side: attacks under blind and adaptive conditions, results, tables, plots."""

"""Figures of results, runs and expert usage, as PNG and SVG."""

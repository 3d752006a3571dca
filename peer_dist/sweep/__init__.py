"""Grids of training runs: their file, the runs of it, their results, and what is fitted to these."""

"""Grids of training runs: the file that describes one, its runs, their results, and fits to these."""

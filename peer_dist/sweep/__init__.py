"""Runs grids of training runs: reads the file that describes one, does its runs, and fits their results."""

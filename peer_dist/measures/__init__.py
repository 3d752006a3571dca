"""Measures a model and a run: held-out loss, usage of experts, and the files in which the numbers are kept."""

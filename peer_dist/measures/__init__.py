"""What is measured of a model and a run: held-out loss, usage of experts, and the files of numbers."""

"""A run's checkpoints, and the models of other formats that a run can start from."""

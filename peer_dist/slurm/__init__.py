"""Training as a Slurm job: the batch script, and its submission."""

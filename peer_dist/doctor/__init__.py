"""``peer-dist doctor``: whether these ranks, on these machines, can train, found out in seconds before a run."""

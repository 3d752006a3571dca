"""``peer-dist doctor`` finds out in seconds, before a run, whether these ranks can train on these machines."""

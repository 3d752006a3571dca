"""``peer-dist doctor`` finds out before a run whether these ranks can train on these machines, and how fast."""

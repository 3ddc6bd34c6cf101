"""Side by side: the engine and its peers on the same work, in one run, as ratios."""

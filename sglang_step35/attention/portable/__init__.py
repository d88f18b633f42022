"""Full and sliding-window attention in plain torch, for CPUs."""

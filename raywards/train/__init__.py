"""Training: prepare the pairs once, run the loop on every worker, keep what it reports."""

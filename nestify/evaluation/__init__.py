"""What levels are worth: accuracy, consensus, cascades, latency, checks, and the best level under limits."""

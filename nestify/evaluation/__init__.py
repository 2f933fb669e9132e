"""Evaluation of levels: accuracy, consensus, cascades, latency, verification, gates, and picking a level."""

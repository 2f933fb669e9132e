"""Coupled channels: which ones a model must keep or drop together, found in its graph of operators."""

"""Blocks that a level can skip: found in the graph of operators of a model, and ranked."""

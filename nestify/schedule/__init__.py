"""Which weights, channels and blocks each level gets, and what a level costs."""

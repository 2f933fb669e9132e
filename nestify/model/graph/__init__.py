"""What can be left out of a network: coupled channels and residual blocks, found in its traced graph."""

"""Find the coupled channels and residual blocks that levels can leave out, in a network's traced graph."""

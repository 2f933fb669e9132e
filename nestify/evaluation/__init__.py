"""How accurate levels are: each alone, several together, and as a cascade."""

from typing import Literal

ConsensusKind = Literal["mean", "learned"]
"""How several levels predict together: by the mean of their probabilities, or with fitted weights."""

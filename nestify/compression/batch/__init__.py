"""Many recipes as jobs, each in its own process and folder. Does not import torch."""

"""What the user asks for: a recipe is read, checked, and frozen. Does not import torch."""

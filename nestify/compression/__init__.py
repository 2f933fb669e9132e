"""From a recipe to a nested file; `batch` runs many recipes."""

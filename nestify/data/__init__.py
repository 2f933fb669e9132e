"""Images and class hierarchies: where they are found, checked, and made into batches."""

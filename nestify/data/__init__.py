"""Images and class hierarchies: finding them, checking them, and making batches."""

"""A nested file on the Hugging Face hub: its model card, the folder of a repository, and the upload."""

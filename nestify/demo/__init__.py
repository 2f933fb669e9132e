"""A static page that fetches levels of a nested file by range requests and runs them in the browser."""

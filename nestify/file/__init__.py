"""The nested file: its format, reading and writing, slices, and files on a server."""

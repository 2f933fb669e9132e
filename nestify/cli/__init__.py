"""The command line: each command parses, calls the Python function, prints and exits."""

from nestify.cli.app import main

__all__ = ["main"]

"""The command line: parse, call the Python twin, print, exit."""

from nestify.cli.app import main

__all__ = ["main"]

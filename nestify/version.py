"""The version of nestify."""

__version__ = "0.1.0"

"""nestify: n networks of different size in one set of weights, in one file."""

__version__ = "0.1.0"

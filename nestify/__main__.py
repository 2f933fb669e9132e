"""Run the command line: `python -m nestify` is the command `nestify`."""

import os

from nestify.cli.app import main
from nestify.compression.batch.runner import LEASH, tie

if __name__ == "__main__":
    if os.environ.pop(LEASH, None):
        tie()
    main()

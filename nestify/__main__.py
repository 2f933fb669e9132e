"""Run the command line: `python -m nestify` is the command `nestify`."""

import os

from nestify.cli.app import main
from nestify.compression.batch.runner import PARENT_PIPE, watch_parent

if __name__ == "__main__":
    if os.environ.pop(PARENT_PIPE, None):
        watch_parent()
    main()

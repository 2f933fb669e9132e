"""`python -m nestify` is the command `nestify`."""

import os

from nestify.batching.leash import LEASH, tie
from nestify.cli import main

if __name__ == "__main__":
    if os.environ.pop(LEASH, None):
        tie()
    main()

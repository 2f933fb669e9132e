"""`python -m nestify` is the command `nestify`."""

from nestify.cli import main

if __name__ == "__main__":
    main()

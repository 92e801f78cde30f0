"""`python -m scoreinv`: the command line."""

import sys

from scoreinv.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m quantopt`: the command line."""

import sys

from quantopt.train.cli import main

if __name__ == "__main__":
    sys.exit(main())

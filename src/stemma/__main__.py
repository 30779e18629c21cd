"""`python -m stemma` is the `stemma` command."""

import sys

from stemma.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

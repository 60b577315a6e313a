"""``python -m dnr_recbole``."""

import sys

from dnr_recbole.cli import main

if __name__ == "__main__":
    sys.exit(main())

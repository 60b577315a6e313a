"""Train and evaluate: ``python run_dnr.py --model=DNR --dataset=ml-100k``."""

import sys

from dnr_recbole.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))

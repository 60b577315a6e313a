"""Search hyper-parameters: ``python run_hyper.py --model=DNR --dataset=ml-100k --tool=hyperopt``."""

import sys

from dnr_recbole.cli import main

if __name__ == "__main__":
    sys.exit(main(["tune", *sys.argv[1:]]))

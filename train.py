"""Pre-trains a model: `python train.py --help`."""

import sys

from doge_lm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

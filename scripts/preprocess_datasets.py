"""Tokenizes and packs the data sets: `python scripts/preprocess_datasets.py --help`."""

import sys

from doge_lm.cli import main

if __name__ == "__main__":
    sys.exit(main(["preprocess_datasets", *sys.argv[1:]]))

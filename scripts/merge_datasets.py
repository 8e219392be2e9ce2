"""Merges, shuffles and splits the tokenized data sets: `python scripts/merge_datasets.py --help`."""

import sys

from doge_lm.cli import main

if __name__ == "__main__":
    sys.exit(main(["merge_datasets", *sys.argv[1:]]))

"""Downloads the data sets, or takes in files of your own: `python scripts/download_datasets.py --help`."""

import sys

from doge_lm.cli import main

if __name__ == "__main__":
    sys.exit(main(["download_datasets", *sys.argv[1:]]))

"""Fine-tunes a model on conversations: `python finetune.py --help`."""

import sys

from doge_lm.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))

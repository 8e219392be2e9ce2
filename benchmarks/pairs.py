"""Pairs of answers made of conversations, to try preference tuning: an answer against that to another question.

    python benchmarks/pairs.py CONVERSATIONS … --output FILE.jsonl [--most 6000] [--seed 233]

Of each conversation the first question and answer; the rejected answer is that of another conversation of the same
file, drawn at random. So a model learns that an answer belongs to its question, and nothing of taste: a test, not a
recipe.
"""

import argparse
import json
import random
from pathlib import Path

from doge_lm.data.sources import ConversationRow, read_rows


def first_turns(path: Path) -> list[tuple[str, str]]:
    """The first question of each conversation of a file with its answer."""
    found = []
    for row in read_rows([path], "finetune"):
        assert isinstance(row, ConversationRow)
        turns = [turn for turn in row.turns if turn[0] != "system"][:2]
        if [role for role, _ in turns] == ["human", "gpt"] and all(content.strip() for _, content in turns):
            found.append((turns[0][1], turns[1][1]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("conversations", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--most", type=int, default=6000, help="pairs of each file")
    parser.add_argument("--seed", type=int, default=233)
    args = parser.parse_args()
    draws = random.Random(args.seed)
    rows = []
    for path in args.conversations:
        turns = first_turns(path)
        for question, answer in draws.sample(turns, min(args.most, len(turns))):
            other = draws.choice(turns)[1]
            if other != answer:
                rows.append({"prompt": question, "chosen": answer, "rejected": other})
    with args.output.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"{len(rows):,} pairs: {args.output}")


if __name__ == "__main__":
    main()

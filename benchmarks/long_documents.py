"""Memory of a process that prepares documents just under the default limit of `--max_document_bytes`.

    python benchmarks/long_documents.py --work_dir DIR --tokenizer_path ./tokenizer --text_dir ../shared/data

For each backend, six documents of 7.5 MiB each of English, of Chinese, and of characters that are in no vocabulary
(each becomes four tokens) are prepared by two processes. Prints the highest anonymous memory of the command's own
process and of any worker, as a table; the exit status is 1 if a worker was above 300 MiB.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import zstandard
from memory import measure

MIB = 2**20
WORKER_BOUND = 300 * MIB
DOCUMENT_BYTES = 15 * MIB // 2  # escapes make the line of JSON somewhat longer
DOCUMENTS = 6
CUNEIFORM = 0x12000, 0x12399


def documents(text_dir: Path) -> dict[str, str]:
    """A document of each kind."""
    generator = random.Random(0)
    rare = "".join(chr(generator.randint(*CUNEIFORM)) for _ in range(DOCUMENT_BYTES // 4))
    texts = {name: "\n\n".join(read(text_dir / f"{name}.jsonl.zst")) for name in ("english", "chinese")}
    return {
        **{name: text.encode()[:DOCUMENT_BYTES].decode(errors="ignore") for name, text in texts.items()},
        "rare": rare,
    }


def read(path: Path) -> list[str]:
    """The texts of a file."""
    with zstandard.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def peaks(text: str, backend: str, args: argparse.Namespace) -> tuple[int, int]:
    """The highest anonymous memory of the main process and of a worker, in bytes.

    Raises:
        RuntimeError: if the command fails.
    """
    folder = args.work_dir / "long_documents"
    folder.mkdir(parents=True)
    try:
        line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
        (folder / "long.jsonl").write_text(line * DOCUMENTS, encoding="utf-8")
        command = [sys.executable, "-m", "doge_lm.cli"]
        local = ["--save_dir", str(folder), "--local", f"long={folder / 'long.jsonl'}"]
        subprocess.run([*command, "download_datasets", *local], check=True, capture_output=True)
        flags = ["--datasets_dir", str(folder), "--save_dir", str(folder), "--num_proc", "2", "--backend", backend]
        tokenizer = ["--tokenizer_path", str(args.tokenizer_path)]
        measured = measure([*command, "preprocess_datasets", *flags, *tokenizer])
        if measured.exit_status:
            raise RuntimeError(f"preprocess_datasets ended with {measured.exit_status}")
        return measured.peak("main"), measured.peak("worker")
    finally:
        shutil.rmtree(folder)


def main() -> int:
    """Measures and prints; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--tokenizer_path", type=Path, required=True)
    parser.add_argument("--text_dir", type=Path, required=True, help="holds english.jsonl.zst and chinese.jsonl.zst")
    args = parser.parse_args()
    lines = ["| backend | text | main, MiB | worker, MiB |", "|---|---|---|---|"]
    highest = 0
    for backend in ("gigatoken", "tokenizers"):
        for name, text in documents(args.text_dir).items():
            main_peak, worker_peak = peaks(text, backend, args)
            highest = max(highest, worker_peak)
            lines.append(f"| {backend} | {name} | {main_peak / MIB:.0f} | {worker_peak / MIB:.0f} |")
    print("\n".join(lines))
    return int(highest > WORKER_BOUND)


if __name__ == "__main__":
    sys.exit(main())

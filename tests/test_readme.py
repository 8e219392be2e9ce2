"""The READMEs hold: every command in them runs as typed, both say the same, links lead somewhere, figures are right.

`make test` itself is the one command that is not run. The others run in order in a copy of the checkout, from `make
demo` on. Its virtual environment begins with the packages of the one that these tests run in, which `make test` has
installed by the same rule; with DOGE_TEST_ALL=1 it begins with nothing. What must be small for a test is made small
without touching the typed command where that can be (`DEMO_FLAGS`, a hub on this machine), and by flags after it
otherwise: `RUNS` says which. A command that `RUNS` does not know fails the test.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from doge_lm.data.manifest import Manifest, RawSource
from doge_lm.data.sources import CATALOGUE
from doge_lm.training.plan import count_model
from doge_lm.training.presets import preset_paths
from doge_lm.training.settings import load_settings
from tests.conftest import ALL, REPOSITORY
from tests.data.loopback import bucket_handler, hub_files, hub_handler, serve
from tests.evaluation.benchmarks import make_benchmarks

README = REPOSITORY / "README.md"
README_ZH = REPOSITORY / "README_zh.md"
MAX_ROWS = 20


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    language: str
    text: str

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()


def blocks(path: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    page = path.read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    assert page.count("```") == 2 * len(found), f"{path.name}: a fence is not closed, or not at the start of its line"
    return [Block(language, text) for language, text in found]


def commands(path: Path) -> list[str]:
    """All lines of the bash blocks, in order."""
    return [line for block in blocks(path) if block.language == "bash" for line in block.lines]


# ---------------------------------------------------------------------------------------------------------------
# What can be read off the pages
# ---------------------------------------------------------------------------------------------------------------


def test_both_pages_have_the_same_code() -> None:
    assert blocks(README) == blocks(README_ZH)
    assert {block.language for block in blocks(README)} == {"bash", "bat", "python"}


def headings(path: Path) -> list[str]:
    outside = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^(#+) ", outside, flags=re.MULTILINE)


def links(path: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))


def test_both_pages_have_the_same_parts() -> None:
    assert headings(README) == headings(README_ZH)
    assert sorted(set(links(README)) - {"README_zh.md"}) == sorted(set(links(README_ZH)) - {"README.md"})
    assert "README_zh.md" in links(README)
    assert "README.md" in links(README_ZH)
    bullets = [re.findall(r"^- ", page.read_text(encoding="utf-8"), flags=re.MULTILINE) for page in (README, README_ZH)]
    assert len(bullets[0]) == len(bullets[1]) > 0


@pytest.mark.parametrize("page", [README, README_ZH], ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    relative = [target for target in links(page) if "://" not in target]
    assert relative
    missing = [target for target in relative if not (REPOSITORY / target.partition("#")[0]).exists()]
    assert not missing


@pytest.mark.parametrize("page", [README, README_ZH], ids=lambda page: page.name)
def test_the_table_of_presets_is_true(page: Path) -> None:
    rows = re.findall(r"^\| `(doge2?_\w+)` \|(.*)\|$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(preset_paths())
    for name, cells in rows:
        total, layers, width, experts, recipe = (cell.strip() for cell in cells.split("|"))
        settings = load_settings(name)
        assert total == f"{count_model(settings.model_config()).total:,}", name
        assert int(layers) == settings.model.num_hidden_layers, name
        assert int(width.replace(",", "")) == settings.model.hidden_size, name
        assert int(experts.replace(",", "")) == settings.model.num_cdmmoe_experts, name
        if name != "doge_tiny":
            train = settings.train
            assert isinstance(train.sequences_per_step, int)
            tokens = train.per_epoch_max_steps * train.sequences_per_step * train.sequence_length
            [billions] = re.findall(r"(\d+)B", recipe)
            assert tokens == pytest.approx(int(billions) * 1e9, rel=0.05), name  # 64B are 67.1e9
            assert train.num_train_epochs == 2, name


def test_the_windows_commands_are_those_of_the_other_blocks() -> None:
    known = [*commands(README), *makefile_recipe("test")]
    [windows] = [block.lines for block in blocks(README) if block.language == "bat"]
    assert len(windows) == 4
    for line in windows:
        assert re.sub(r"^py ", "python3 ", line).replace("\\Scripts\\", "/bin/").replace("\\", "/") in known, line


def makefile_recipe(target: str) -> list[str]:
    """The recipe of a target, its variables filled in."""
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(rf"^{target}:.*\n((?:\t.*\n?)+)", makefile, flags=re.MULTILINE)
    assert recipe is not None, target
    return [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines()]


# ---------------------------------------------------------------------------------------------------------------
# What must run
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """How one command is run here.

    Attributes:
        flags: put behind the typed command, so that it takes seconds.
        makes: what must be there afterwards and not before.
        says: what the output must contain.
        before: what a user has done before, apart from the commands.
        after: looks closer at what the command left.
        itself: it is the command that runs these tests, and is left out.
    """

    flags: str = ""
    makes: tuple[str, ...] = ()
    says: str = ""
    before: Callable[[Path], None] | None = None
    after: Callable[[Path], None] | None = None
    itself: bool = False


def take_back(root: Path) -> None:
    """Removes what `lend_packages` wrote in place of pip."""
    for link in (root / ".venv/lib").glob(f"python*/site-packages/{LENT_LINK}"):
        link.unlink()
        (root / ".venv/bin/doge-lm").unlink()


def check_demo(root: Path) -> None:
    log = [json.loads(line) for line in (root / "demo/log/train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert any("loss" in entry for entry in log)
    assert (root / "demo/log/curve.png").read_bytes().startswith(b"\x89PNG")
    assert "## Answers" in (root / "demo/log_chat/report.md").read_text(encoding="utf-8")


def check_download(root: Path) -> None:
    for name in CATALOGUE:
        assert RawSource.read(root / "datasets/raw" / name).counts["rows"] == MAX_ROWS


def check_tokenized(root: Path) -> None:
    manifests = {name: Manifest.read(root / "datasets/tokenized" / name) for name in CATALOGUE}
    assert {manifest.sequence_length for manifest in manifests.values()} == {2048}
    assert {name: manifest.kind for name, manifest in manifests.items()} == {
        name: entry.kind for name, entry in CATALOGUE.items()
    }


def check_merged(root: Path) -> None:
    for kind in ("pretrain", "finetune"):
        manifest = Manifest.read(root / "datasets" / kind)
        sources = {name for name, entry in CATALOGUE.items() if entry.kind == kind}
        assert {name for split in manifest.samples.values() for name in split} == sources


def write_texts(root: Path) -> None:
    (root / "texts").mkdir()
    (root / "texts" / "mine.txt").write_text("A text of my own.\n", encoding="utf-8", newline="\n")


def check_local(root: Path) -> None:
    [file] = RawSource.read(root / "datasets/raw/my-texts").files
    assert Path(file.path) == (root / "texts/mine.txt").resolve()


def check_cleaned(root: Path) -> None:
    # One text of each source is there twice; of cosmopedia's, the command before has left one out.
    for name, dropped in {"cosmopedia-v2-dedup": 0, "chinese-cosmopedia": 1, "python-edu": 1}.items():
        accounting = Manifest.read(root / "cleaned/tokenized" / name).accounting[name]
        assert accounting.documents_kept == MAX_ROWS - 1, name
        assert sum(reason.times for reason in accounting.dropped.values()) == dropped, name


def check_mixed(root: Path) -> None:
    manifest = Manifest.read(root / "cleaned/pretrain")
    tokens = {name: counts.tokens for name, counts in manifest.samples["train"].items()}
    assert set(tokens) == {"cosmopedia-v2-dedup", "chinese-cosmopedia", "python-edu"}
    assert tokens["cosmopedia-v2-dedup"] / sum(tokens.values()) == pytest.approx(0.5, abs=0.1)


def write_more_texts(root: Path) -> None:
    lines = [json.dumps({"text": README.read_text(encoding="utf-8")[number:]}) for number in range(100)]
    (root / "texts" / "more.jsonl").write_text("\n".join(lines), encoding="utf-8")


def interrupt(root: Path) -> None:
    """Puts the run back to where its first checkpoint was the last one."""
    shutil.rmtree(root / "results/checkpoint-2")
    (root / "results/model.safetensors").unlink()


def write_benchmarks(root: Path) -> None:
    make_benchmarks(root / "eval_data", count=3)


def write_pairs(root: Path) -> None:
    rows = [{"prompt": f"{n} + 1?", "chosen": f"{n + 1}", "rejected": "I do not know."} for n in range(6)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


ONE_STEP = (
    "--set sequences_per_step=1 --set per_device_train_batch_size=1 --set per_epoch_max_steps=1 "
    "--set num_train_epochs=1 --set save_steps=1 --set per_device_eval_batch_size=1 --set bf16=false"
)
TWO_STEPS = ONE_STEP.replace("per_epoch_max_steps=1", "per_epoch_max_steps=2")
# Each process that reads data imports PyTorch; as many as the preset says are started where nothing is added.
ONE_READER = "--set dataloader_num_workers=1"

# In the background, asked once, and told to stop.
SERVED = (
    "--port 0 > served.txt 2>&1 & server=$!\n"
    "for wait in $(seq 600); do grep -q http:// served.txt && break; sleep 0.2; done\n"
    "url=$(grep -om 1 'http://[0-9.:]*' served.txt)\n"
    """python3 -c "import sys; from urllib.request import urlopen; print(urlopen(sys.argv[1]).read())" $url/health\n"""
    "kill $server; wait $server"
)

RUNS = {
    "make demo": Run(
        makes=("demo/model/config.json", "demo/chat/config.json"),
        says="next:",
        after=check_demo,
    ),
    ".venv/bin/doge-lm serve ./demo/chat": Run(SERVED, says='"status":"ok"'),
    "make test": Run(itself=True),
    "python3 -m venv .venv": Run(before=take_back),
    '.venv/bin/python -m pip install --constraint constraints.txt --editable ".[dev]"': Run(),
    ".venv/bin/doge-lm demo": Run("--steps 1 --max_documents 8", says="next:", after=check_demo),
    ". .venv/bin/activate": Run(),
    "doge-lm tokenizer build --save_dir ./tokenizer": Run(makes=("tokenizer/tokenizer.json",)),
    "python scripts/download_datasets.py --save_dir ./datasets --cache_dir ./datasets/cache --num_proc 16": Run(
        f"--max_rows {MAX_ROWS}", makes=("datasets/raw",), after=check_download
    ),
    "python scripts/preprocess_datasets.py --datasets_dir ./datasets --save_dir ./datasets "
    "--tokenizer_path ./tokenizer --max_len 2048 --num_proc 16": Run(
        makes=("datasets/tokenized",), after=check_tokenized
    ),
    "python scripts/merge_datasets.py --datasets_dir ./datasets --save_dir ./datasets --num_proc 16": Run(
        "--test_size 2", makes=("datasets/pretrain", "datasets/finetune"), after=check_merged
    ),
    "python train.py --config_path ./model/config/doge_25M.yaml --logging_dir ./log --output_dir ./results "
    "--tokenizer_path ./tokenizer": Run(
        TWO_STEPS,
        makes=("results/model.safetensors", "results/checkpoint-1", "results/checkpoint-2", "log/curve.png"),
        says="24,422,656 total",
    ),
    "python scripts/download_datasets.py --save_dir ./datasets --local my-texts=./texts": Run(
        makes=("datasets/raw/my-texts",), before=write_texts, after=check_local
    ),
    "python train.py --config_path ./model/config/doge_25M.yaml --logging_dir ./log --output_dir ./results "
    "--tokenizer_path ./tokenizer --resume_from_checkpoint": Run(
        f"{TWO_STEPS} {ONE_READER}",
        makes=("results/model.safetensors", "results/checkpoint-2"),
        says="1 of 2 steps are done",
        before=interrupt,
    ),
    "doge-lm train --config_path doge_80M --dry_run --set learning_rate=1e-3 --set sequences_per_step=64": Run(
        says="78,572,032 total"
    ),
    'doge-lm generate ./results "Once upon a time"': Run("--max_new_tokens 8", says="Once upon a time"),
    "doge-lm eval ./results --data_dir ./eval_data --texts en=./texts": Run(
        "--tasks local_copa --limit 2", says="| local_copa | acc", before=write_benchmarks
    ),
    "python finetune.py --config_path ./model/config/finetune/doge_25M.yaml --model_path ./results "
    "--dataset_path ./datasets/finetune --logging_dir ./log_finetune --output_dir ./results_finetune": Run(
        f"{ONE_STEP} {ONE_READER}",
        makes=("results_finetune/model.safetensors", "log_finetune/report.md"),
        says="report: log_finetune/report.md",
    ),
    "doge-lm chat ./results_finetune": Run('--message "Who are you?" --max_new_tokens 4'),
    "doge-lm serve ./results_finetune": Run(SERVED, says='"status":"ok"'),
    "doge-lm export ./results_finetune --output_dir ./exported --dtype bfloat16": Run(
        makes=("exported/model.safetensors", "exported/export.json")
    ),
    "doge-lm dpo --config_path doge_25M --model_path ./results_finetune --dataset_path ./pairs.jsonl "
    "--logging_dir ./log_dpo --output_dir ./results_dpo": Run(
        f"{ONE_STEP} --set dpo.test_share=0.5",
        makes=("results_dpo/model.safetensors", "log_dpo/report.md"),
        says="pairs to train on",
        before=write_pairs,
    ),
    "doge-lm data inspect ./datasets/pretrain --tokenizer_path ./tokenizer": Run(
        makes=("pretrain-inspect.png",), says="cosmopedia-v2"
    ),
    "doge-lm data near_duplicates --datasets_dir ./datasets --datasets cosmopedia-v2 --save_dir ./datasets "
    "--num_proc 16": Run(
        "--num_proc 1", makes=("datasets/raw/cosmopedia-v2-dedup",), says=f"kept {MAX_ROWS - 1}, dropped 1 near"
    ),
    "doge-lm preprocess_datasets --datasets_dir ./datasets --save_dir ./cleaned --tokenizer_path ./tokenizer "
    "--max_len 2048 --num_proc 16 --datasets cosmopedia-v2-dedup chinese-cosmopedia python-edu --min_chars 200 "
    "--languages cosmopedia-v2-dedup=en chinese-cosmopedia=zh --deduplicate": Run(
        "--num_proc 1 --max_len 256", makes=("cleaned/tokenized",), after=check_cleaned
    ),
    "doge-lm merge_datasets --datasets_dir ./cleaned --save_dir ./cleaned --num_proc 16 "
    "--mix cosmopedia-v2-dedup=0.5,chinese-cosmopedia=0.3,python-edu=0.2 --tokens 4B": Run(
        "--num_proc 1 --tokens 20K --test_size 8", makes=("cleaned/pretrain",), says="epochs", after=check_mixed
    ),
    "doge-lm train --config_path doge_25M --output_dir ./results-stream --logging_dir ./log-stream "
    "--tokenizer_path ./tokenizer --set stream=./texts": Run(
        f"--config_path doge_tiny {ONE_STEP} --set stream_test_rows=2",
        makes=("results-stream/model.safetensors",),
        says="tokenized meanwhile",
        before=write_more_texts,
    ),
}

# What the python block is followed by: it loaded the trained model, from its directory alone.
AFTER_PYTHON = """
import sys

assert "doge_lm" not in sys.modules
assert model.num_parameters() == 24_422_656, model.num_parameters()
ids = tokenizer("Once upon a time", return_tensors="pt")
assert model.generate(**ids, max_new_tokens=2).shape[1] > ids["input_ids"].shape[1]
"""


class Shell:
    """A shell in a directory, whose environment lives on from one command to the next."""

    def __init__(self, root: Path, environment: dict[str, str]) -> None:
        self._root = root
        self._environment = environment

    def __call__(self, command: str, stdin: str | None = None) -> str:
        """Runs a command in bash and returns its output; the test fails if the command does."""
        kept = self._root / "environment"
        begin = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", f'{command}\nstatus=$?; env -0 > "$0"; exit $status', str(kept)],
            cwd=self._root,
            env=self._environment,
            input="" if stdin is None else stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=1800,
            check=False,
        )
        # pytest shows this if the test fails.
        print(f"\n$ {command}\n{done.stdout}({time.monotonic() - begin:.1f} seconds)")
        assert done.returncode == 0, f"`{command}` of the README ended with {done.returncode}:\n{done.stdout[-4000:]}"
        entries = kept.read_text(encoding="utf-8").split("\0")
        self._environment = dict(entry.split("=", 1) for entry in entries if entry)
        kept.unlink()
        return done.stdout


def copy_checkout(target: Path) -> None:
    """Copies what is in the repository or about to be: nothing that git ignores, `.venv` above all."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode("utf-8").split("\0")):
        if (REPOSITORY / name).is_file():  # a file that was removed may still be in the index
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, target / name)


def bare_environment(folder: Path) -> dict[str, str]:
    """The user's environment before any set-up, with `python3` the Python of these tests, outside of their `.venv`."""
    prefixes = ("HF_", "HUGGING", "PYTEST_", "TOKENIZERS_", "DOGE_", "DEMO_", "MAKE", "MFLAGS", "PYTHON", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    python = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    (folder / "bin").mkdir()
    (folder / "bin" / "python3").write_text(f'#!/bin/sh\nexec "{python}" "$@"\n', encoding="utf-8")
    (folder / "bin" / "python3").chmod(0o755)
    path = [entry for entry in environment["PATH"].split(os.pathsep) if Path(entry) != Path(sys.prefix) / "bin"]
    environment["PATH"] = os.pathsep.join([str(folder / "bin"), *path])
    return environment | {
        "DEMO_FLAGS": "--steps 2 --max_documents 8",
        "HF_HOME": str(folder / "huggingface"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MPLCONFIGDIR": str(folder / "matplotlib"),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


LENT_LINK = "aa_lent.pth"
SCRIPT = """import sys
from doge_lm.cli import main

if __name__ == "__main__":
    sys.exit(main())
"""


def lend_packages(shell: Shell, root: Path) -> None:
    """What `make install` makes in a copy of the checkout, with the packages of this environment as its own.

    pip is left to the set-up by hand (`take_back`); what it would write is written here.
    """
    shell("python3 -m venv --without-pip .venv")
    [site] = (root / ".venv" / "lib").glob("python*/site-packages")
    (site / LENT_LINK).write_text(f"{root / 'src'}\n", encoding="utf-8")
    # Behind the entries of packages that are installed there: pip's link to the copy comes first.
    (site / "zz_lent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    script = root / ".venv" / "bin" / "doge-lm"
    script.write_text(f"#!{root}/.venv/bin/python\n{SCRIPT}", encoding="utf-8")
    script.chmod(0o755)
    (root / ".venv" / ".installed").touch()


def hub_contents() -> tuple[dict[str, dict[str, bytes]], dict[str, bytes]]:
    """Small tables for every source of the catalogue, by repository, and python-edu's contents by blob id.

    Of the rows that are taken, the first and the last have the same text.
    """
    words = {name: README.read_text(encoding="utf-8").split() for name in CATALOGUE}
    words["chinese-cosmopedia"] = re.findall(r"[\u4e00-\u9fff]", README_ZH.read_text(encoding="utf-8"))
    chance = random.Random(233)
    configs: dict[str, dict[str, dict[str, list[Any]]]] = {}
    blobs: dict[str, bytes] = {}
    for name, entry in CATALOGUE.items():
        separator = "" if name == "chinese-cosmopedia" else " "
        texts = [separator.join(chance.choices(words[name], k=500)) for _ in range(MAX_ROWS + 5)]
        texts[MAX_ROWS - 1] = texts[0]
        ids = [f"{name}-{number}" for number in range(len(texts))]
        fields: dict[str, list[Any]] = {
            "text": texts,
            "prompt": [f"Write about {id_}." for id_ in ids],
            "conversations": [[{"from": "human", "value": "Go on."}, {"from": "gpt", "value": text}] for text in texts],
            "blob_id": ids,
            "repo_name": ids,
            "path": ids,
        }
        if entry.contents_from_software_heritage:
            blobs |= {id_: text.encode("utf-8") for id_, text in zip(ids, texts, strict=True)}
        table = {field: fields[field] for field in entry.fields} | {"left_out": ids}
        configs.setdefault(entry.hub_id, {})[entry.config or "default"] = table
    return {name: hub_files(tables) for name, tables in configs.items()}, blobs


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    """A shell in a copy of the checkout, with a hub on this machine."""
    if sys.platform == "win32" or shutil.which("make") is None or shutil.which("bash") is None:
        pytest.skip("needs make and bash")
    if shutil.which("git") is None or not (REPOSITORY / ".git").exists():
        pytest.skip("needs a git checkout")
    root = tmp_path / "checkout"
    copy_checkout(root)
    repositories, blobs = hub_contents()
    with serve(hub_handler(repositories)) as hub, serve(bucket_handler(blobs, {})) as bucket:
        yield Shell(root, bare_environment(tmp_path) | {"HF_ENDPOINT": hub, "DOGE_CONTENTS_ENDPOINT": bucket})
    shutil.rmtree(root)  # gigabytes, which pytest would keep


def test_every_command_is_known() -> None:
    assert commands(README) == list(RUNS)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # five to fifteen minutes, by what else the machine does
def test_the_commands_run_as_typed(shell: Shell, tmp_path: Path) -> None:
    """Some ten minutes on two cores."""
    root = tmp_path / "checkout"
    if not ALL:
        lend_packages(shell, root)
    for block in blocks(README):
        if block.language == "python":
            output = shell("python -", block.text + AFTER_PYTHON)
            assert "Do you wish" not in output, "the block leaves transformers with a question to the user"
        for command in block.lines if block.language == "bash" else []:
            run = RUNS[command]
            if run.itself:
                continue
            if run.before is not None:
                run.before(root)
            there = [path for path in run.makes if (root / path).exists()]
            assert not there, f"{there} is there before `{command}`"
            output = shell(f"{command} {run.flags}".rstrip())
            assert run.says in output, f"`{command}` does not say {run.says!r}:\n{output}"
            missing = [path for path in run.makes if not (root / path).exists()]
            assert not missing, f"`{command}` did not make {missing}"
            if run.after is not None:
                run.after(root)

"""The notebook: it runs from top to bottom, says everything in both languages, and what is saved in it is whole."""

import argparse
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from doge_lm.cli import COMMANDS
from doge_lm.training.plan import count_model
from doge_lm.training.settings import FinetuneSettings, load_settings, load_settings_of
from tests.conftest import REPOSITORY

NOTEBOOK = REPOSITORY / "notebook.ipynb"
MOST_BYTES = 1_500_000
PICTURES = 4
HAN = re.compile(r"[\u4e00-\u9fff]")
GPU = ("**25M on a GPU.**", "**GPU 上的 25M。**")


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def sections(notebook: Any) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook: Any) -> str:
    """All that the cells' outputs say."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    texts = [output.get("text", "") + str(output.get("data", {}).get("text/markdown", "")) for output in outputs]
    return "".join(texts)


def pictures(notebook: Any) -> int:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def errors(notebook: Any) -> list[Any]:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]


def setting(name: str) -> int:
    """What the notebook takes where the environment says nothing."""
    [value] = re.findall(rf'"DOGE_NOTEBOOK_{name}", "(\d+)"', read().cells[2].source)
    return int(value)


def bits_per_byte(text: str) -> tuple[float, float]:
    """Of the excerpt, by hand and by `doge-lm eval`, whose first table of texts is that of the base model."""
    [by_hand] = re.findall(r"^excerpt, by hand in section 9: (\d+\.\d{4}) bits per byte$", text, flags=re.MULTILINE)
    by_command, _ = re.findall(r"^\| excerpt +\|(?: +[\d,]+ \|){3} +(\d+\.\d{4}) \|", text, flags=re.MULTILINE)
    return float(by_hand), float(by_command)


# ---------------------------------------------------------------------------------------------------------------
# What it says
# ---------------------------------------------------------------------------------------------------------------


def test_every_section_is_in_english_and_chinese() -> None:
    found = sections(read())
    assert len(found) > 10
    for source in found:
        heading, *paragraphs = re.sub(r"^```.*?^```$", "", source, flags=re.MULTILINE | re.DOTALL).strip().split("\n\n")
        english, _, chinese = heading.partition(" · ")
        assert english.startswith("#"), heading
        assert not HAN.search(english), heading
        assert HAN.search(chinese), heading
        paragraphs = [paragraph for paragraph in paragraphs if paragraph.strip()]
        assert len(paragraphs) in (2, 4), heading
        # English, then the same in Chinese.
        languages = [bool(HAN.search(re.sub(r"\*\*GPU 上的 25M。?\*\*", "", part))) for part in paragraphs]
        assert languages == [False, True] * (len(paragraphs) // 2), heading


def test_every_step_says_what_it_is_on_a_gpu() -> None:
    for source in sections(read())[2:]:
        paragraphs = source.split("\n\n")
        assert [sum(part.startswith(mark) for part in paragraphs) for mark in GPU] == [1, 1], source[:40]


def test_figures_of_the_gpu_are_those_of_the_results() -> None:
    known = (REPOSITORY / "benchmarks/RESULTS.md").read_text(encoding="utf-8")
    settings = load_settings("doge_25M")
    steps = settings.train.per_epoch_max_steps * settings.train.num_train_epochs
    known += f" {steps:,} {settings.train.sequence_length:,} {count_model(settings.model_config()).total:,}"
    for mark in GPU:
        parts = [part for source in sections(read()) for part in source.split("\n\n") if part.startswith(mark)]
        figures = [figure for part in parts for figure in re.findall(r"\d+(?:[.,]\d{3})+", part)]
        assert len(figures) > 15
        assert not [figure for figure in figures if not re.search(rf"(?<![\d.,]){re.escape(figure)}(?!\d)", known)]


def test_commands_for_a_gpu_are_ones_that_there_are() -> None:
    blocks = [block for source in sections(read()) for block in re.findall(r"^```bash\n(.*?)```", source, re.M | re.S)]
    names = []
    for block in blocks:
        _, script, *arguments = shlex.split(block.replace("\\\n", " "))
        name = Path(script).stem
        [command] = [command for command in COMMANDS if command.name == name]
        parser = argparse.ArgumentParser(exit_on_error=False)
        command.add_arguments(parser)
        args = parser.parse_args(arguments)
        if name == "train":
            load_settings(args.config_path, args.overrides)
        else:
            load_settings_of(FinetuneSettings, REPOSITORY / args.config_path, args.overrides, name)
        names.append(name)
    assert names == ["train", "finetune"]


def test_links_lead_to_files() -> None:
    targets = [target for source in sections(read()) for target in re.findall(r"\]\(([^)\s]+)\)", source)]
    relative = [target.partition("#")[0] for target in targets if "://" not in target]
    assert relative
    assert not [target for target in relative if not (REPOSITORY / target).exists()]


# ---------------------------------------------------------------------------------------------------------------
# What is saved in it
# ---------------------------------------------------------------------------------------------------------------


def test_the_saved_outputs_are_those_of_one_whole_run() -> None:
    notebook = read()
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert errors(notebook) == []
    assert pictures(notebook) == PICTURES
    text = printed(notebook)
    assert "Traceback" not in text
    steps = setting("STEPS")
    assert f"step {steps} of {steps}:" in text
    by_hand, by_command = bits_per_byte(text)
    assert by_hand == pytest.approx(by_command, abs=2e-4)


def test_the_saved_outputs_are_small_and_name_no_place() -> None:
    assert NOTEBOOK.stat().st_size < MOST_BYTES
    lines = printed(read()).splitlines()
    assert not [line for line in lines if re.search(r"(?<![\w.:/\"'<])/\w+/\w|[A-Z]:\\\\", line)]


# ---------------------------------------------------------------------------------------------------------------
# That it runs
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a fresh kernel and an empty folder, the smallest run there is."""
    settings = {"STEPS": 2, "LENGTH": 128, "DOCUMENTS": 8, "HELD_OUT": 4, "TUNING_EPOCHS": 1}
    assert all(value < setting(name) for name, value in settings.items())
    for name, value in settings.items():
        monkeypatch.setenv(f"DOGE_NOTEBOOK_{name}", str(value))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # on a loaded machine, threads mostly wait for each other
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):  # no settings and kernels of the user's
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv("JUPYTER_PATH", raising=False)
    monkeypatch.delenv("MPLBACKEND", raising=False)
    place = tmp_path / "place"
    place.mkdir()
    notebook = read()
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(place)}},
        coalesce_streams=True,
    )
    client.execute()  # a cell that fails raises CellExecutionError, with its traceback
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for output in errors(notebook) if output.output_type == "error"]
    assert pictures(notebook) == PICTURES
    text = printed(notebook)
    assert f"step {settings['STEPS']} of {settings['STEPS']}" in text
    by_hand, by_command = bits_per_byte(text)
    assert by_hand == pytest.approx(by_command, abs=2e-4)
    assert "the formula gives what the layers compute" in text
    assert "doge_lm imported: False" in text
    assert [path.name for path in place.iterdir()] == ["notebook-run"]
    shutil.rmtree(place)  # hundreds of MB, which pytest would keep

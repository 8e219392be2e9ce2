"""The pages of docs/ hold: what they say of the columns, flags and settings is what there is."""

import argparse
import re
from importlib import import_module

import numpy as np
import pytest
from lm_eval.tasks import TaskManager

from doge_lm.cli import COMMANDS
from doge_lm.data.storage import row_schema
from doge_lm.evaluation.local_data import TASKS
from doge_lm.inference import chat, serve
from doge_lm.inference.api import ChatRequest, CompletionRequest
from doge_lm.inference.chat_session import COMMANDS as COMMANDS_OF_CHAT
from doge_lm.inference.service import DEFAULT_MAX_TOKENS
from doge_lm.model.cdmoe import PATHS
from doge_lm.training.settings import Settings, TrainSettings, apply_override
from tests.conftest import REPOSITORY

PAGES = (
    "docs/chat.md",
    "docs/data.md",
    "docs/evaluation.md",
    "docs/export.md",
    "docs/finetuning.md",
    "docs/packing.md",
    "docs/serving.md",
    "docs/speed.md",
    "docs/zh/chat.md",
    "docs/zh/export.md",
    "docs/zh/finetuning.md",
    "docs/zh/serving.md",
)


def read(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def test_the_columns_of_a_prepared_set_are_listed() -> None:
    section = read("docs/data.md").partition("\n## What is written\n")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \| ((?:list of )?\w+)", section, flags=re.MULTILINE)
    assert listed == [
        (field.name, str(field.type).replace("list<item: ", "list of ").removesuffix(">"))
        for field in row_schema(np.dtype(np.uint16))
    ]


@pytest.mark.parametrize("page", PAGES)
def test_flags_and_settings_that_are_named_are_there(page: str) -> None:
    known = {"help", "set"}
    for command in COMMANDS:
        parser = argparse.ArgumentParser()
        import_module(command.module).add_arguments(parser)
        known |= set(re.findall(r"--(\w+)", parser.format_help()))
    text = read(page)
    assert set(re.findall(r"(?<![\w-])--([a-z]\w+)", text)) <= known | {"data"}  # `--data` is of a benchmark
    assert set(re.findall(r"--set (\w+)=", text)) <= set(vars(TrainSettings()))


@pytest.mark.parametrize("page", PAGES)
def test_settings_take_the_values_that_are_named(page: str) -> None:
    for key, value in re.findall(r"`(\w+): (\w+)`", read(page)):
        settings = Settings()
        apply_override(settings, f"{key}={value}")
        settings.model_config()


@pytest.mark.parametrize("page", ["docs/serving.md", "docs/zh/serving.md"])
def test_fields_and_statuses_of_the_server_are_there(page: str) -> None:
    """Every field that the API takes is on the page, and every default of the limits is right."""
    text = read(page)
    fields = {*CompletionRequest.model_fields, *ChatRequest.model_fields}
    assert fields <= set(re.findall(r"`(\w+)`", text))
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    defaults = vars(parser.parse_args(["model"]))
    listed = dict(re.findall(r"^\| `--(\w+)` \| ([\d,]+)", text, flags=re.MULTILINE))
    assert int(listed.pop("max_slots").rstrip(",")) == serve.DEFAULT_SLOTS
    assert {name: int(value.replace(",", "")) for name, value in listed.items()} == {
        name: defaults[name] for name in ("max_queue", "max_body_bytes")
    }
    assert re.search(rf"--drain_seconds`[ （(]+{defaults['drain_seconds']:.0f}\D", text)
    assert f"{serve.DEFAULT_CONTEXT:,}" in text
    assert f"{DEFAULT_MAX_TOKENS} " in text


def test_the_ready_tasks_are_listed_with_their_files_and_fields() -> None:
    listed = re.findall(r"^\| `(local_\w+)` \| `(\w+)` \| (.*?) \|", read("docs/evaluation.md"), flags=re.MULTILINE)
    same = re.findall(r"`(\w+)`", listed[0][2])
    entries = TaskManager(include_path=TASKS, include_defaults=False).task_index
    data = {name: entry.cfg["dataset_kwargs"] for name, entry in entries.items()}
    found = {name: (kwargs["file"], list(kwargs["fields"])) for name, kwargs in data.items()}
    assert found == {task: (file, re.findall(r"`(\w+)`", fields) or same) for task, file, fields in listed}


def test_the_paths_of_the_experts_are_listed() -> None:
    section = read("docs/speed.md").partition("\n## The experts: ")[2].partition("\n## ")[0]
    assert {"auto", *re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)} == set(PATHS)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", read(page)) if "://" not in target]
    assert not [
        target for target in targets if not (REPOSITORY / page).parent.joinpath(target.partition("#")[0]).exists()
    ]


@pytest.mark.parametrize("page", ["docs/chat.md", "docs/zh/chat.md"])
def test_the_commands_and_flags_of_a_conversation_are_listed(page: str) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    chat.add_arguments(parser)
    flags = {option for action in parser._actions for option in action.option_strings}
    assert set(re.findall(r"^\| `/(\w+)", read(page), flags=re.MULTILINE)) == set(COMMANDS_OF_CHAT)
    assert flags <= set(re.findall(r"--\w+", read(page)))

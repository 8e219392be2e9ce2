"""The guides hold: commands, flags, settings and names in them are there, links and anchors lead somewhere, tables say
what the code says, and each page says the same in both languages."""

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from lm_eval.tasks import TaskManager
from transformers.utils import logging

from doge_lm import DogeConfig, DogeForCausalLM
from doge_lm.cli import COMMANDS
from doge_lm.data.storage import row_schema
from doge_lm.errors import UserError
from doge_lm.evaluation.suites import TASKS
from doge_lm.inference.api import ChatRequest, CompletionRequest
from doge_lm.inference.chat_session import COMMANDS as COMMANDS_OF_CHAT
from doge_lm.inference.flags import DEFAULT_CONTEXT, DEFAULT_SLOTS, add_serve_arguments
from doge_lm.inference.service import DEFAULT_MAX_TOKENS
from doge_lm.model.cdmoe import PATHS, key_table_sizes
from doge_lm.training.plan import count_model
from doge_lm.training.presets import preset_paths
from doge_lm.training.settings import (
    FinetuneSettings,
    ModelSettings,
    PreferenceSettings,
    RunSettings,
    Settings,
    TrainSettings,
    apply_override,
    load_settings,
)
from tests.conftest import REPOSITORY

DOCS = REPOSITORY / "docs"
NO_GUIDES = ("log.md", "evidence.md")  # dated notes, and what is still being measured, in English alone
GUIDES = sorted(path.name for path in DOCS.glob("*.md") if path.name not in NO_GUIDES)
PAGES = [*(DOCS / name for name in GUIDES), *(DOCS / "zh" / name for name in GUIDES)]
KINDS: dict[str, type[RunSettings]] = {"train": Settings, "finetune": FinetuneSettings, "dpo": PreferenceSettings}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
every_pair = pytest.mark.parametrize("name", GUIDES)
both_languages = pytest.mark.parametrize("folder", [DOCS, DOCS / "zh"], ids=["en", "zh"])


# ---------------------------------------------------------------------------------------------------------------
# Reading a page
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Page:
    """A page in parts: fenced blocks with their languages, indented blocks, and its prose, without both."""

    text: str
    fenced: list[tuple[str, str]]
    indented: list[str]
    prose: str

    @classmethod
    def read(cls, path: Path) -> "Page":
        text = path.read_text(encoding="utf-8")
        fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
        assert text.count("```") == 2 * len(fenced), f"{path}: a fence is not closed, or not at the start of its line"
        rest = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        block = r"(?:(?<=\n\n)|\A)(?:    .*\n|\n(?=    ))+"
        return cls(text, fenced, re.findall(block, rest), re.sub(block, "", rest))

    @property
    def blocks(self) -> list[str]:
        return [*(text for _, text in self.fenced), *self.indented]

    @property
    def headings(self) -> list[tuple[int, str]]:
        return [(len(marks), title) for marks, title in re.findall(r"^(#+) (.*)$", self.prose, flags=re.MULTILINE)]

    @property
    def anchors(self) -> list[str]:
        """Of the headings in order, as GitHub makes them."""
        found: list[str] = []
        for _, title in self.headings:
            words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower()
            anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
            repeated = sum(re.sub(r"-\d+$", "", each) == anchor for each in found)
            found.append(f"{anchor}-{repeated}" if repeated else anchor)
        return found

    @property
    def links(self) -> list[str]:
        return re.findall(r"\]\(([^)\s]+)\)", self.prose)

    @property
    def spans(self) -> list[str]:
        """What stands in backticks."""
        return re.findall(r"`([^`\n]+)`", self.prose)

    def table(self, first_header: str) -> list[list[str]]:
        """The rows of the table whose first column has this header, without it, as cells."""
        lines = re.findall(rf"^\| {re.escape(first_header)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", self.prose, re.MULTILINE)
        assert len(lines) == 1, f"{len(lines)} tables begin with the column {first_header!r}"
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[0].splitlines()]

    def commands(self) -> Iterator[tuple[str, str]]:
        """Every call of this project in blocks and backticks: the command's name and the words behind it."""
        spans = [span for span in self.spans if re.match(r"(doge-lm|python) ", span)]
        lines = [line for block in self.blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
        for line in [*lines, *spans]:
            call = re.search(
                r"(?:^|\s)doge-lm ((?:data )?[\w-]+)(.*)|(?:^|\s)(?:scripts/)?(\w+)\.py (.*)", line.strip()
            )
            if call is None or "benchmarks/" in line:
                continue
            name = call[1] or call[3]
            yield name.replace("-", "_"), call[2] or call[4] or ""


def read(path: Path) -> Page:
    return Page.read(path)


@cache
def options(name: str) -> frozenset[str]:
    """The flags of a command, those of its subcommands too."""
    [command] = [command for command in COMMANDS if command.name == name]
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return frozenset(_options(parser))


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from _options(each)


@cache
def words_of_the_code() -> frozenset[str]:
    files = [*(REPOSITORY / "src").rglob("*.py"), *(REPOSITORY / "src").rglob("*.yaml"), *preset_paths().values()]
    return frozenset(word for file in files for word in re.findall(r"\w+", file.read_text(encoding="utf-8")))


# ---------------------------------------------------------------------------------------------------------------
# Both languages
# ---------------------------------------------------------------------------------------------------------------


def test_every_guide_is_there_in_both_languages() -> None:
    assert sorted(path.name for path in (DOCS / "zh").glob("*.md")) == GUIDES
    assert len(GUIDES) > 5


@every_pair
def test_each_page_opens_with_a_link_to_its_other_language(name: str) -> None:
    for page, link in ((DOCS / name, f"[中文](zh/{name})"), (DOCS / "zh" / name, f"[English](../{name})")):
        assert read(page).text.split("\n")[1:4] == ["", link, ""], page


@every_pair
def test_both_languages_have_the_same_code_and_parts(name: str) -> None:
    english, chinese = read(DOCS / name), read(DOCS / "zh" / name)
    assert english.fenced == chinese.fenced
    assert english.indented == chinese.indented
    assert [level for level, _ in english.headings] == [level for level, _ in chinese.headings]
    for mark in (r"^- ", r"^\d+\. "):
        counts = [len(re.findall(mark, page.prose, flags=re.MULTILINE)) for page in (english, chinese)]
        assert counts[0] == counts[1], mark
    shapes = [
        [line.count("|") for line in re.findall(r"^\|.*$", page.prose, re.MULTILINE)] for page in (english, chinese)
    ]
    assert shapes[0] == shapes[1]


@every_pair
def test_both_languages_have_the_same_figures(name: str) -> None:
    """Numbers with a point, a comma or a percent sign: none of these is written as a word."""
    found = [
        sorted(set(re.findall(r"\d[\d,]*\.\d+%?|\d+(?:,\d{3})+|\d+%", page.prose)))
        for page in (read(DOCS / name), read(DOCS / "zh" / name))
    ]
    assert found[0] == found[1]


@every_pair
def test_both_languages_have_the_same_links(name: str) -> None:
    found = [
        _places(page) - {(DOCS / name, None), (DOCS / "zh" / name, None)} for page in (DOCS / name, DOCS / "zh" / name)
    ]
    assert _of_english(found[0]) == _of_english(found[1])


def _places(page: Path) -> set[tuple[Path | str, int | None]]:
    """What a page links to: file and number of the heading, or address."""
    places: set[tuple[Path | str, int | None]] = set()
    for link in read(page).links:
        if "://" in link:
            places.add((link, None))
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        places.add((path, read(path).anchors.index(anchor) if anchor else None))
    return places


def _of_english(places: set[tuple[Path | str, int | None]]) -> set[tuple[str, int | None]]:
    """The same places, with the English page or figure for a Chinese one."""
    return {(str(path).replace("/docs/zh/", "/docs/").replace("_zh.", "."), heading) for path, heading in places}


def test_figures_with_words_are_the_same_drawing_in_both_languages() -> None:
    pairs = [(DOCS / "figures" / path.name.replace("_zh.", "."), path) for path in (DOCS / "figures").glob("*_zh.svg")]
    assert pairs
    for english, chinese in pairs:
        drawings = [re.sub(r">[^<\n]+<", "><", path.read_text(encoding="utf-8")) for path in (english, chinese)]
        assert drawings[0] == drawings[1]


# ---------------------------------------------------------------------------------------------------------------
# Links, commands and names
# ---------------------------------------------------------------------------------------------------------------


@every_page
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in read(page).links:
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        path = page.parent / target if target else page
        assert path.exists(), link
        assert not anchor or anchor in read(path).anchors, link


@every_page
def test_commands_are_there_with_their_flags(page: Path) -> None:
    names = {command.name for command in COMMANDS}
    for name, words in read(page).commands():
        assert name in names, f"{name} {words}"
        assert set(re.findall(r"(?<!\S)(--[\w-]+)", words)) <= options(name) | {"--help"}, f"{name} {words}"


@every_page
def test_flags_in_the_text_are_of_some_command(page: Path) -> None:
    known = {option for command in COMMANDS for option in options(command.name)} | {"--help"}
    assert {flag for span in read(page).spans for flag in re.findall(r"(?<!\S)(--[a-z][\w-]*)", span)} <= known


@every_page
def test_settings_take_the_values_that_are_named(page: Path) -> None:
    text = read(page)
    for name, words in text.commands():
        for override in re.findall(r"--set (\S+)", words):
            apply_override(KINDS[name](), override)
    # `--set key=value`, `key=value` and `key: value` of a key that looks like one, in backticks
    for span in text.spans:
        named = re.fullmatch(r"(?:--set )?([a-z][a-z0-9_.]*)(?:=|: )(\S+)", span)
        if named is not None:
            assert _fits(f"{named[1]}={named[2]}"), span


def _fits(override: str) -> bool:
    """Whether some kind of run takes it."""
    for kind in KINDS.values():
        settings = kind()
        try:
            apply_override(settings, override)
        except UserError:
            continue
        if isinstance(settings, Settings):
            settings.model_config()
        return True
    return False


@every_page
def test_presets_that_are_named_are_there(page: Path) -> None:
    text = read(page)
    code = " ".join([*text.blocks, *text.spans])
    for path in re.findall(r"\./(model/config/\S+\.yaml)", code):
        assert (REPOSITORY / path).is_file(), path
    assert set(re.findall(r"(?<![\w/.])(doge2?_(?:tiny|\d+M))\b", code)) <= set(preset_paths())
    given = {path for _, words in text.commands() for path in re.findall(r"--config_path (\S+)", words)}
    assert {path for path in given if "/" not in path} <= set(preset_paths())


@every_page
def test_names_that_are_named_are_in_the_code(page: Path) -> None:
    """A name with an underscore in backticks: a settings key, a field, a command, a file of a run."""
    named = {span for span in read(page).spans if re.fullmatch(r"[A-Za-z]\w*_\w+", span)}
    left_out = {"dynamic_mask"}  # of the published code, and not of this
    assert named <= words_of_the_code() | set(preset_paths()) | left_out


# ---------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------


@both_languages
def test_the_columns_of_a_prepared_set_are_listed(folder: Path) -> None:
    listed = re.findall(r"^\| `(\w+)` \| ((?:list of )?[a-z0-9]+)\W", read(folder / "data.md").text, flags=re.MULTILINE)
    assert listed == [
        (field.name, str(field.type).replace("list<item: ", "list of ").removesuffix(">"))
        for field in row_schema(np.dtype(np.uint16))
    ]


@both_languages
def test_the_ready_tasks_are_listed_with_their_files_and_fields(folder: Path) -> None:
    listed = re.findall(r"^\| `(local_\w+)` \| `(\w+)` \| (.*?) \|", read(folder / "evaluation.md").text, re.MULTILINE)
    same = re.findall(r"`(\w+)`", listed[0][2])
    entries = TaskManager(include_path=TASKS, include_defaults=False).task_index
    data = {name: entry.cfg["dataset_kwargs"] for name, entry in entries.items()}
    found = {name: (kwargs["file"], list(kwargs["fields"])) for name, kwargs in data.items()}
    assert found == {task: (file, re.findall(r"`(\w+)`", fields) or same) for task, file, fields in listed}


@pytest.mark.parametrize(("folder", "header"), [(DOCS, "path"), (DOCS / "zh", "路径")], ids=["en", "zh"])
def test_the_paths_of_the_experts_are_listed(folder: Path, header: str) -> None:
    assert {"auto", *(row[0].strip("`") for row in read(folder / "speed.md").table(header))} == set(PATHS)


@pytest.mark.parametrize(("folder", "header"), [(DOCS, "key"), (DOCS / "zh", "键")], ids=["en", "zh"])
def test_every_setting_that_may_be_auto_is_explained(folder: Path, header: str) -> None:
    kinds = get_type_hints(TrainSettings)
    keys = [field.name for field in fields(TrainSettings) if "auto" in _literals(kinds[field.name])]
    assert sorted(row[0].strip("`") for row in read(folder / "pretraining.md").table(header)) == sorted(
        [*keys, "cdmoe_path"]
    )


def _literals(kind: object) -> set[object]:
    inner = [_literals(each) for each in get_args(kind)]
    return set().union(*inner) if inner else {kind}


@pytest.mark.parametrize(("folder", "header"), [(DOCS, "preset"), (DOCS / "zh", "预设")], ids=["en", "zh"])
def test_the_schedules_of_the_presets_are_true(folder: Path, header: str) -> None:
    section = re.search(
        r"^## (?:Presets and settings|预设与设置)\n.*?(?=^## )", read(folder / "pretraining.md").text, re.M | re.S
    )
    assert section is not None
    rows = Page(section[0], [], [], section[0]).table(header)
    assert sorted(row[0].strip("`") for row in rows) == sorted(preset_paths())
    for name, _, sequences, steps, rate in rows:
        train = load_settings(name.strip("`")).train
        assert _numbers(sequences) == [train.sequences_per_step, train.sequence_length], name
        assert _numbers(steps) == [train.per_epoch_max_steps, train.num_train_epochs], name
        assert float(rate) == train.learning_rate, name


def _numbers(cell: str) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"\d+(?:,\d{3})*", cell)]


@pytest.mark.parametrize(("folder", "header"), [(DOCS, "preset"), (DOCS / "zh", "预设")], ids=["en", "zh"])
def test_the_sizes_of_the_presets_are_true(folder: Path, header: str) -> None:
    rows = read(folder / "architecture.md").table(header)
    assert sorted(row[0].strip("`") for row in rows) == sorted(preset_paths())
    for name, *cells, work in rows:
        settings = load_settings(name.strip("`"))
        config, model = settings.model_config(), settings.model
        counts = count_model(config)
        tables = key_table_sizes(model.num_cdmmoe_experts) if model.num_cdmmoe_experts else ()
        assert [number for cell in cells for number in _numbers(cell)] == [
            *(model.num_hidden_layers, model.hidden_size, model.num_attention_heads, model.num_inner_values),
            *(model.cross_domain_intermediate_size, model.private_expert_intermediate_size),
            *(model.num_cdmmoe_experts, *tables),
            *(model.num_cdmmoe_heads, model.num_cdmmoe_experts_per_head, counts.total, counts.active),
        ], name
        assert work == f"{counts.flops_per_token(settings.train.sequence_length) / 1e6:,.1f}", name


@pytest.mark.parametrize(("folder", "header"), [(DOCS, "field"), (DOCS / "zh", "字段")], ids=["en", "zh"])
def test_every_option_of_the_model_is_listed(folder: Path, header: str) -> None:
    rows = read(folder / "architecture.md").table(header)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(named) == sorted(field.name for field in fields(ModelSettings))


@pytest.mark.parametrize(
    ("folder", "header", "with_options"),
    [
        (DOCS, "name in a layer (`model.layers.0.…`)", "with an option"),
        (DOCS / "zh", "一层中的名字（`model.layers.0.…`）", "有选项时"),
    ],
    ids=["en", "zh"],
)
def test_the_parameters_are_listed_with_their_shapes(folder: Path, header: str, with_options: str) -> None:
    settings = load_settings("doge_200M")  # n1 and n2 differ, and every other size but d and e
    settings.model.private_expert_intermediate_size = 640
    page = read(folder / "architecture.md")
    published = layer_shapes(settings.model_config())
    assert listed_shapes(page.table(header), settings.model_config()) == published
    settings.model.qk_norm = settings.model.shared_gate = settings.model.value_residual = True
    settings.model.key_shift = settings.model.attention_shift = settings.model.feed_forward_shift = True
    settings.model.router_queries = False
    listed = listed_shapes(page.table(with_options), settings.model_config())
    changed = dict(layer_shapes(settings.model_config()).items() - published.items())
    assert listed == changed


def listed_shapes(rows: list[list[str]], config: DogeConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a table whose second column has letters."""
    n1, n2 = key_table_sizes(config.num_cdmmoe_experts)
    letters = {
        "d": config.hidden_size,
        "d_h": config.hidden_size // config.num_attention_heads,
        "r": config.inner_values_retrieval_size,
        "n": config.num_inner_values,
        "d_cross": config.cross_domain_intermediate_size,
        "e": config.private_expert_intermediate_size,
        "N": config.num_cdmmoe_experts,
        "H": config.num_cdmmoe_heads,
        "H·e": config.num_cdmmoe_heads * config.private_expert_intermediate_size,
        "n1 + n2": n1 + n2,
        "e/2": config.private_expert_intermediate_size // 2,
    }
    return {row[0].strip("`"): tuple(letters[letter] for letter in row[1].strip("()").split(", ")) for row in rows}


def layer_shapes(config: DogeConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters of a layer."""
    with torch.device("meta"):
        layer = DogeForCausalLM(config).model.layers[1]
    return {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}


def test_the_code_of_the_page_on_the_architecture_runs() -> None:
    logging.set_verbosity_error()
    blocks = [text for language, text in read(DOCS / "architecture.md").fenced if language == "python"]
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "architecture.md", "exec"), {})


@both_languages
def test_the_commands_and_flags_of_a_conversation_are_listed(folder: Path) -> None:
    text = read(folder / "chat.md").text
    assert set(re.findall(r"^\| `/(\w+)", text, flags=re.MULTILINE)) == set(COMMANDS_OF_CHAT)
    assert options("chat") - {"-h"} <= set(re.findall(r"--\w+", text)) | {"--help"}


@both_languages
def test_fields_and_statuses_of_the_server_are_there(folder: Path) -> None:
    """Every field that the API takes is on the page, and every default of the limits is right."""
    text = read(folder / "serving.md").text
    fields = {*CompletionRequest.model_fields, *ChatRequest.model_fields}
    assert fields <= set(re.findall(r"`(\w+)`", text))
    parser = argparse.ArgumentParser()
    add_serve_arguments(parser)
    defaults = vars(parser.parse_args(["model"]))
    listed = dict(re.findall(r"^\| `--(\w+)` \| ([\d,]+)", text, flags=re.MULTILINE))
    assert int(listed.pop("max_slots").rstrip(",")) == DEFAULT_SLOTS
    assert {name: int(value.replace(",", "")) for name, value in listed.items()} == {
        name: defaults[name] for name in ("max_queue", "max_body_bytes")
    }
    assert re.search(rf"--drain_seconds`[ （(]+{defaults['drain_seconds']:.0f}\D", text)
    assert f"{DEFAULT_CONTEXT:,}" in text
    assert f"{DEFAULT_MAX_TOKENS} " in text

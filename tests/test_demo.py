"""The demo: its corpus, its commands, and what it may remove. tests/test_readme.py runs it whole."""

import argparse
import json
import shutil
from pathlib import Path

import pytest

from doge_lm import cli, demo
from doge_lm.errors import UserError
from doge_lm.training.settings import FinetuneSettings, load_settings, load_settings_of
from tests.conftest import REPOSITORY

SOURCES = ["python-library", "python-help", "package-descriptions"]
ALL = [*SOURCES, "python-answers"]


def documents(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_bytes().split(b"\n") if line]


def everything(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------------------------
# The corpus
# ---------------------------------------------------------------------------------------------------------------


def test_the_corpus_is_the_same_each_time_and_enough_to_learn_from(tmp_path: Path) -> None:
    first, again = (demo.write_corpus(tmp_path / name) for name in ("first", "again"))
    assert list(first) == list(again) == ALL
    for name in SOURCES:
        texts = documents(first[name])
        assert first[name].read_bytes() == again[name].read_bytes()
        assert len(texts) == len(set(texts)) >= 20
        assert all(text.strip() for text in texts)
    assert sum(path.stat().st_size for path in first.values()) > 5 * 10**6
    assert any("class ArgumentParser" in text for text in documents(first["python-library"]))


def test_conversations_are_made_of_the_manual(tmp_path: Path) -> None:
    path = demo.write_corpus(tmp_path)["python-answers"]
    rows = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) > 40
    for turns in rows:
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert all(turn["content"].strip() for turn in turns)
    assert demo.QUESTION in [turns[0]["content"] for turns in rows]
    assert demo.conversation('The "pass" statement\n****\n\n   pass_stmt ::= "pass"\n\nshort\n') == []


def test_max_documents_takes_the_first_of_each_source(tmp_path: Path) -> None:
    whole, part = demo.write_corpus(tmp_path / "whole"), demo.write_corpus(tmp_path / "part", max_documents=3)
    for name in SOURCES:
        assert documents(part[name]) == documents(whole[name])[:3]


# ---------------------------------------------------------------------------------------------------------------
# What may be removed
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """The directory of an earlier demo."""
    work_dir = tmp_path / "demo"
    demo._start_afresh(work_dir)
    for name in demo._FOLDERS:
        (work_dir / name / "below").mkdir(parents=True)
        (work_dir / name / "below" / "file").write_bytes(b"x")
    return work_dir


def test_an_earlier_demo_makes_room(earlier: Path) -> None:
    demo._start_afresh(earlier)
    assert [path.name for path in earlier.iterdir()] == [demo._RECORD]
    demo._start_afresh(earlier)  # and one that was killed at once


def test_a_new_or_an_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for work_dir in (tmp_path / "empty", tmp_path / "new" / "deep"):
        demo._start_afresh(work_dir)
        assert (work_dir / demo._RECORD).is_file()


@pytest.mark.parametrize("name", ["notes.txt", "model/weights", f"{demo._RECORD}"])
def test_a_directory_that_the_demo_did_not_make_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(UserError, match=r"was not made by the demo; .*--work_dir"):
        demo._start_afresh(tmp_path)
    assert everything(tmp_path) == {str(Path(name)): b"mine"}


def test_a_file_put_beside_the_demo_stops_it_before_anything_is_removed(earlier: Path) -> None:
    (earlier / "notes.txt").write_bytes(b"mine")
    before = everything(earlier)
    with pytest.raises(UserError, match=r"notes\.txt was not made by the demo"):
        demo._start_afresh(earlier)
    assert everything(earlier) == before


def test_a_link_is_not_followed(earlier: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_bytes(b"mine")
    shutil.rmtree(earlier / "model")
    try:
        (earlier / "model").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    except OSError as error:
        pytest.skip(f"this system makes no links: {error}")
    with pytest.raises(UserError, match="model was not made by the demo"):
        demo._start_afresh(earlier)
    assert (tmp_path / "elsewhere" / "file").read_bytes() == b"mine"


def test_a_file_is_not_a_work_dir(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    assert cli.main(["demo", "--work_dir", str(tmp_path / "file")]) == 1
    assert "is not a directory" in capsys.readouterr().err
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_git_ignores_what_the_demo_makes() -> None:
    assert "/demo/" in (REPOSITORY / ".gitignore").read_text(encoding="utf-8").splitlines()


# ---------------------------------------------------------------------------------------------------------------
# The commands
# ---------------------------------------------------------------------------------------------------------------


def parse(arguments: list[str]) -> argparse.Namespace:
    """The arguments as the command itself takes them."""
    [command] = [command for command in cli.COMMANDS if command.name == arguments[0]]
    parser = argparse.ArgumentParser(exit_on_error=False)
    command.add_arguments(parser)
    return parser.parse_args(arguments[1:])


def test_the_commands_are_the_whole_path_and_fit_together(tmp_path: Path) -> None:
    corpus = {name: tmp_path / "corpus" / f"{name}.jsonl" for name in ALL}
    found = demo.commands(tmp_path, corpus, steps=None)
    stages = ["tokenizer", "download_datasets", "preprocess_datasets", "merge_datasets", "train"]
    assert [command[0] for command in found] == [*stages, *["generate"] * len(demo.PROMPTS), "finetune", "chat"]
    _, download, preprocess, merge, train, *generate, finetune, chat = (parse(command) for command in found)
    assert download.local == [f"{name}={path}" for name, path in corpus.items()]
    assert download.save_dir == preprocess.datasets_dir == preprocess.save_dir == merge.datasets_dir == merge.save_dir
    assert Path(train.dataset_path) == merge.save_dir / "pretrain"
    assert preprocess.tokenizer_path == train.tokenizer_path
    assert preprocess.max_len == load_settings(demo.PRESET).train.sequence_length
    assert [(command.model, command.texts) for command in generate] == [(train.output_dir, [p]) for p in demo.PROMPTS]
    assert train.overrides == finetune.overrides == []
    assert finetune.model_path == train.output_dir
    assert Path(finetune.dataset_path) == merge.save_dir / "finetune"
    assert chat.model == finetune.output_dir


def test_steps_shorten_the_training(tmp_path: Path) -> None:
    [train] = [command for command in demo.commands(tmp_path, {}, steps=7) if command[0] == "train"]
    settings = load_settings(demo.PRESET, parse(train).overrides).train
    assert settings.per_epoch_max_steps * settings.num_train_epochs == 7
    [finetune] = [command for command in demo.commands(tmp_path, {}, steps=7) if command[0] == "finetune"]
    tuning = load_settings_of(FinetuneSettings, demo.PRESET, parse(finetune).overrides, "finetune").train
    assert (tuning.per_epoch_max_steps, tuning.num_train_epochs) == (7, 1)


@pytest.mark.parametrize("flag", ["--steps", "--max_documents"])
def test_numbers_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    assert cli.main(["demo", "--work_dir", str(tmp_path / "demo"), flag, "0"]) == 1
    assert f"{flag} is 0; it must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_a_stage_that_fails_ends_the_demo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def stage(arguments: list[str]) -> int:
        ran.append(arguments[0])
        return 0 if arguments[0] == "tokenizer" else 1

    monkeypatch.setattr(demo, "main", stage)
    assert cli.main(["demo", "--work_dir", str(tmp_path / "demo"), "--max_documents", "1"]) == 1
    assert ran == ["tokenizer", "download_datasets"]
    output = capsys.readouterr().out
    assert "download_datasets --save_dir" in output
    assert "next:" not in output


def test_it_ends_by_saying_where_everything_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "main", lambda arguments: 0)
    work_dir = tmp_path / "demo"
    assert cli.main(["demo", "--work_dir", str(work_dir), "--max_documents", "1"]) == 0
    end = capsys.readouterr().out.partition("\nmodel:")[2]
    assert str(work_dir / "model") in end
    assert str(work_dir / "log" / "curve.png") in end
    assert f"serve {work_dir / 'chat'} " in end


def test_commands_are_printed_so_that_the_shell_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "bin" / "doge-lm"
    exe = f"{script}.EXE"
    for path, name in ((None, str(script)), (str(script), "doge-lm"), (exe, "doge-lm"), ("/other", str(script))):
        monkeypatch.setattr(demo.shutil, "which", lambda command, path=path: path)
        monkeypatch.setattr(demo.sys, "argv", [str(script)])
        assert demo._own_name() == name
    monkeypatch.setattr(demo.sys, "argv", ["pytest"])
    assert demo._own_name() == "doge-lm"

"""The command line: what it lists, how it fails, and that help needs no heavy imports."""

import errno
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed

from doge_lm import __version__, cli
from doge_lm.cli import COMMANDS, Command, main


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert all(command.name in out for command in COMMANDS)


def test_no_command_shows_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "preprocess_datasets" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_every_command_has_help_of_its_own(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*command.split(), "--help"])
    assert exit_.value.code == 0
    assert f"usage: doge-lm {command}" in capsys.readouterr().out


def test_hyphens_do_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["merge-datasets", "--help"])
    assert exit_.value.code == 0
    assert "merge_datasets" in capsys.readouterr().out


def test_an_unknown_command_lists_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["trian"])
    assert exit_.value.code == 2
    assert "train" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["inspct"], []])
def test_the_commands_on_data_are_listed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if arguments:
        with pytest.raises(SystemExit) as exit_:
            main(["data", *arguments])
        assert exit_.value.code == (2 if arguments == ["inspct"] else 0)
    else:
        assert main(["data"]) == 2
    shown = capsys.readouterr()
    text = shown.out + shown.err
    assert "usage: doge-lm data [" in text
    assert "near_duplicates" in text
    assert "inspect" in text
    assert "data __" not in text


def test_an_error_of_the_user_is_one_line_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config_path", "no_such_preset"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "no_such_preset" in err
    assert "Traceback" not in err


def test_a_missing_extra_is_named() -> None:
    """In a process of its own: here, modules that were imported before would not miss it."""
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from doge_lm.cli import main\n"
        "sys.exit(main(['merge_datasets', '--datasets_dir', 'x', '--save_dir', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "needs the package 'pyarrow'" in done.stderr
    assert "doge-lm[all]" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_and_wrong_flags_wait_for_no_heavy_import() -> None:
    """In a process of its own, since here all is imported."""
    code = (
        "import sys; from doge_lm.cli import COMMANDS, main\n"
        "names = [command.name.split() for command in COMMANDS]\n"
        "for arguments in (['--help'], *([*name, flag] for name in names for flag in ('--help', '--no_such_flag'))):\n"
        "    try: main(arguments)\n"
        "    except SystemExit as exit_: print('status', exit_.code)\n"
        "print('heavy', [name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, encoding="utf-8")
    statuses = [line for line in done.stdout.splitlines() if line.startswith("status")]
    assert statuses == ["status 0", *["status 0", "status 2"] * len(COMMANDS)]
    assert "heavy []" in done.stdout.splitlines()


def test_a_place_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert main(["demo", "--work_dir", str(tmp_path / "demo"), "--steps", "1"]) == 1
    err = capsys.readouterr().err
    assert str(tmp_path / "demo") in err
    assert "Traceback" not in err


def test_other_system_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        main(["demo", "--work_dir", str(tmp_path / "demo"), "--steps", "1"])


def test_a_process_group_is_ended_with_the_command(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("A small text. " * 50, encoding="utf-8")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        assert main(["download_datasets", "--save_dir", str(tmp_path), "--local", f"a={tmp_path / 'corpus.txt'}"]) == 0
        assert not distributed.is_initialized()
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of a POSIX shell")
def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{shlex.quote(sys.executable)} -m doge_lm.cli --help | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout == "u"
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


@pytest.mark.parametrize(
    ("name", "said"),
    [
        *(
            (name, "interrupted; the same command goes on where it stopped\n")
            for name in ("download_datasets", "preprocess_datasets", "merge_datasets", "data near_duplicates")
        ),
        ("train", "interrupted; with --resume_from_checkpoint it goes on from the last checkpoint\n"),
        ("generate", "interrupted\n"),
    ],
)
def test_ctrl_c_says_how_to_go_on(
    name: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(command: Command, arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupt)
    assert main(name.split()) == 130
    assert capsys.readouterr().err == said

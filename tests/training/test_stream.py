"""Training straight from text."""

import json
import shutil
import sys
from pydoc_data.topics import topics

import pytest
import zstandard

from doge_lm.cli import main
from doge_lm.data import encoders, streaming
from doge_lm.training.checkpoints import RunRecord, list_checkpoints
from tests.conftest import needs_all

from .support import LENGTH, TWO_PROCESSES, finish, log_lines, losses, start
from .test_resume import wait_for_step

STREAM = {"stream_test_rows": 6, "stream_workers": 1, "per_epoch_max_steps": 12, "num_train_epochs": 1}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The help texts of Python in a plain and a packed file."""
    folder = tmp_path_factory.mktemp("text")
    lines = [json.dumps({"text": topics[name]}).encode() + b"\n" for name in sorted(topics)]
    (folder / "a.jsonl").write_bytes(b"".join(lines[::2]))
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress(b"".join(lines[1::2])))
    return folder


def train(world, place, text, *flags, **settings):
    return main(["train", *world.flags(place, *flags, stream=str(text), **{**STREAM, **settings})])


@pytest.fixture
def _small(monkeypatch):
    """Blocks of few rows, so that a short run comes by many of them."""
    monkeypatch.setattr(streaming, "_BLOCK_BYTES", 2000)
    monkeypatch.setattr(streaming, "_PART_BYTES", 1000)
    monkeypatch.setattr(streaming, "_SMALL_FILE_BYTES", 100)


@pytest.mark.usefixtures("_small")
def test_a_run_on_a_stream_resumes_from_every_checkpoint_bit_for_bit(world, text, tmp_path, capsys):
    settings = {"save_total_limit": None, "save_steps": 2}
    whole = tmp_path / "whole"
    assert train(world, whole, text, **settings) == 0
    assert "tokenized meanwhile (workers on each device: 1; held out: 6 rows)" in capsys.readouterr().out
    lines = log_lines(whole)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    assert lines[-1]["tokens_seen"] == 12 * 8 * LENGTH
    assert "eval_stream_bits_per_byte" in log_lines(whole, "eval")[-1]
    saved = list_checkpoints(whole / "out")
    assert len({RunRecord.read(checkpoint).stream["row"] for checkpoint in saved}) >= 3  # in several blocks
    for keep in (1, 4):
        place = tmp_path / f"resumed-{keep}"
        shutil.copytree(whole, place)
        for checkpoint in list_checkpoints(place / "out")[keep:]:
            shutil.rmtree(checkpoint)
        # Another micro-batch would draw other numbers for the dropout; more workers do not.
        assert train(world, place, text, "--resume_from_checkpoint", stream_workers=2, **settings) == 0
        assert losses(place) == losses(whole)
        assert evaluations(place) == evaluations(whole)


def evaluations(place):
    return [{key: line[key] for key in line if key != "time"} for line in log_lines(place, "eval")]


@pytest.mark.usefixtures("_small")
def test_the_batch_size_does_not_change_the_data(world, text, tmp_path):
    model = {"hidden_dropout": 0.0}
    for micro in (2, 8):
        flags = world.flags(
            tmp_path / str(micro), model=model, stream=str(text), per_device_train_batch_size=micro, **STREAM
        )
        assert main(["train", *flags]) == 0
    two, eight = (losses(tmp_path / str(micro)) for micro in (2, 8))
    assert two == pytest.approx(eight, abs=2e-5)


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(world, text, tmp_path):
    settings = {**STREAM, "stream": str(text), "stream_workers": 2, "per_epoch_max_steps": 24, "save_steps": 4}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(["train", *world.flags(whole, **settings)]) == 0
    process = start(world.flags(killed, **settings))
    wait_for_step(killed, 9, process)
    process.kill()
    process.communicate()
    assert main(["train", *world.flags(killed, "--resume_from_checkpoint", **settings)]) == 0
    assert losses(killed) == losses(whole)
    weights = [place / "out" / "model.safetensors" for place in (whole, killed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
@needs_all
def test_two_processes_train_as_one(world, text, tmp_path):
    settings = {**STREAM, "stream": str(text), "per_device_train_batch_size": "auto", "logging_steps": 2}
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["train", *world.flags(one, model={"hidden_dropout": 0.0}, **settings)]) == 0
    finish(start(world.flags(two, model={"hidden_dropout": 0.0}, **settings), TWO_PROCESSES))
    assert losses(two) == pytest.approx(losses(one), abs=2e-5)


def test_other_text_or_another_test_set_is_refused(world, text, tmp_path, capsys):
    place = tmp_path / "run"
    settings = {"per_epoch_max_steps": 2, "save_steps": 2}
    assert train(world, place, text, **settings) == 0
    assert train(world, place, text, "--resume_from_checkpoint", stream_test_rows=7, **settings) == 1
    assert "stream_test_rows is 6 there and 7 here" in capsys.readouterr().err
    other = tmp_path / "other"
    shutil.copytree(text, other)
    assert train(world, place, other, "--resume_from_checkpoint", **settings) == 0  # the same text elsewhere
    (other / "more.txt").write_text("more", encoding="utf-8")
    assert train(world, place, other, "--resume_from_checkpoint", **settings) == 1
    assert "more.txt is new; put the text back" in capsys.readouterr().err
    assert main(["train", *world.flags(place, "--resume_from_checkpoint", **{**STREAM, **settings})]) == 1
    assert "data_sha256" in capsys.readouterr().err


@pytest.mark.usefixtures("_small")
def test_a_run_goes_on_where_the_faster_backend_is_not_installed(world, text, tmp_path, monkeypatch, capsys):
    pytest.importorskip("gigatoken")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert train(world, whole, text, save_steps=4, save_total_limit=None) == 0
    assert "tokenizing with the faster backend `gigatoken`" in capsys.readouterr().out
    shutil.copytree(whole, resumed)
    for checkpoint in list_checkpoints(resumed / "out")[1:]:
        shutil.rmtree(checkpoint)
    monkeypatch.setitem(sys.modules, "awkward", None)  # as gigatoken needs it
    assert train(world, resumed, text, "--resume_from_checkpoint", save_steps=4, save_total_limit=None) == 0
    out = capsys.readouterr().out
    assert "tokenizing with the slower backend `tokenizers`: the fast backend is not installed" in out
    assert losses(resumed) == losses(whole)
    assert evaluations(resumed) == evaluations(whole)


def test_a_backend_that_gives_other_ids_is_not_taken(world, text, tmp_path, monkeypatch, capsys):
    pytest.importorskip("gigatoken")

    class Wrong(encoders.GigatokenEncoder):
        """Differs in a text of the user's alone."""

        def encode(self, texts):
            ids, lengths = super().encode(texts)
            return ids + ("Augmented assignment" in "".join(texts)), lengths

    right, wrong = tmp_path / "right", tmp_path / "wrong"
    assert train(world, right, text, per_epoch_max_steps=2) == 0
    monkeypatch.setattr(encoders, "GigatokenEncoder", Wrong)
    capsys.readouterr()
    assert train(world, wrong, text, per_epoch_max_steps=2) == 0
    assert "slower backend `tokenizers`: gigatoken gives other ids than tokenizers for" in capsys.readouterr().out
    assert losses(wrong) == losses(right)


def test_bad_rows_stop_a_run_or_are_counted_in_its_log(world, tmp_path, capsys):
    folder = tmp_path / "text"
    folder.mkdir()
    lines = [json.dumps({"text": topics[name][:500]}) for name in sorted(topics)[:40]]
    (folder / "a.jsonl").write_text("\n".join([*lines, "no json", '{"text": " "}']), encoding="utf-8")
    for line in ("a.jsonl", "stream_on_error=skip"):
        assert train(world, tmp_path / line, folder) == 1
        assert line in capsys.readouterr().err
    settings = {"stream_on_error": "skip", "per_epoch_max_steps": 60, "save_steps": 60, "eval_steps": 60}
    assert train(world, tmp_path / "skipped", folder, **settings) == 0
    assert "left out (the first of its kind; the log counts them)" in capsys.readouterr().out
    last = log_lines(tmp_path / "skipped")[-1]
    assert last["stream_epoch"] >= 1
    assert last["stream_skipped"] >= 2 * (last["stream_epoch"] + 1)  # as many in every pass


def test_two_sources_at_once_are_refused(world, text, tmp_path, capsys):
    assert train(world, tmp_path, text, "--dataset_path", "elsewhere") == 1
    assert "both name the data" in capsys.readouterr().err
    assert train(world, tmp_path, tmp_path / "none") == 1
    assert "there is no such file or folder" in capsys.readouterr().err


def test_the_plan_names_the_stream(world, text, tmp_path, capsys):
    assert train(world, tmp_path, text, "--dry_run", document_mask=True) == 0
    out = capsys.readouterr().out
    assert f"the text of {text}, tokenized meanwhile" in out
    assert "attention          within documents" in out


def test_a_run_that_read_in_another_order_is_refused(world, tmp_path, capsys):
    settings = {"per_epoch_max_steps": 2, "num_train_epochs": 1, "save_steps": 2}
    assert main(["train", *world.flags(tmp_path, **settings)]) == 0
    (checkpoint,) = list_checkpoints(tmp_path / "out")
    record = RunRecord.read(checkpoint)
    object.__setattr__(record, "order", 1)
    record.write(checkpoint)
    assert main(["train", *world.flags(tmp_path, "--resume_from_checkpoint", **settings)]) == 1
    assert "reads the data in the order of version 1, and this doge-lm in that of version 2" in capsys.readouterr().err

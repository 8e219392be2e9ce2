import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from doge_lm.cli import main
from doge_lm.training.checkpoints import RunRecord, check_whole, list_checkpoints
from tests.conftest import ALL

from .support import ROOT, log_lines, losses, make_set, one_thread, start

STEPS = {"per_epoch_max_steps": 6, "num_train_epochs": 4, "save_steps": 2}


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """A run of 24 steps without interruption; a process of its own reads the data, which must make no difference."""
    place = tmp_path_factory.mktemp("whole")
    assert main(["train", *world.flags(place, dataloader_num_workers=1, **STEPS)]) == 0
    return place


def wait_for_step(place, step, process):
    log = place / "log" / "train.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and f'{{"step": {step}, ' in log.read_text(encoding="utf-8"):
            return
        time.sleep(0.002)
    raise AssertionError(f"step {step} was not reached: {process.communicate()[0]}")


@pytest.mark.slow
def test_killed_at_random_steps_and_resumed_equals_uninterrupted_bit_for_bit(world, whole, tmp_path):
    steps = sorted(random.sample(range(3, 23), 2 if ALL else 1))
    resume = []
    for step in steps:
        process = start(world.flags(tmp_path, *resume, **STEPS))
        wait_for_step(tmp_path, step, process)
        process.kill()  # SIGKILL; on Windows TerminateProcess
        process.communicate()
        for checkpoint in list_checkpoints(tmp_path / "out"):
            check_whole(checkpoint)
        resume = ["--resume_from_checkpoint"] if list_checkpoints(tmp_path / "out") else ["--overwrite"]
    assert main(["train", *world.flags(tmp_path, *resume, **STEPS)]) == 0
    assert losses(tmp_path) == losses(whole), f"killed at steps {steps}"
    for kind, times in (("train", ("time", "tokens_per_second", "mfu")), ("eval", ("time",))):
        expected, found = log_lines(whole, kind), log_lines(tmp_path, kind)
        assert len(expected) == len(found)
        for a, b in zip(expected, found, strict=True):
            assert {key: a[key] for key in a if key not in times} == {key: b[key] for key in b if key not in times}
    assert not list((tmp_path / "out").glob(".tmp-*"))
    weights = [place / "out" / "model.safetensors" for place in (whole, tmp_path)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["RunRecord.write", "publish"])
def test_a_process_that_dies_while_it_saves_leaves_no_half_checkpoint(world, whole, tmp_path, moment):
    """It ends at once, without any clean-up, when the checkpoint of step 4 is half written or written but not named."""
    program = (
        "import os, sys\n"
        "from doge_lm.training import checkpoints\n"
        "owner = checkpoints.RunRecord if sys.argv[1] == 'RunRecord.write' else checkpoints\n"
        "name = sys.argv[1].split('.')[-1]\n"
        "original = getattr(owner, name)\n"
        "def die(*args):\n"
        "    if any('checkpoint-4' in str(each) for each in args[:2]):\n"
        "        os._exit(9)\n"
        "    return original(*args)\n"
        "setattr(owner, name, die)\n"
        "from doge_lm.cli import main\n"
        "main(['train', *sys.argv[2:]])\n"
    )
    command = [sys.executable, "-c", program, moment, *world.flags(tmp_path, **STEPS)]
    result = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", env=one_thread(), cwd=ROOT, check=False
    )
    assert result.returncode == 9, result.stderr
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    assert list((tmp_path / "out").glob(".tmp-*"))
    assert main(["train", *world.flags(tmp_path, "--resume_from_checkpoint", **STEPS)]) == 0
    assert losses(tmp_path) == losses(whole)
    assert not list((tmp_path / "out").glob(".tmp-*"))


@pytest.fixture
def interrupted(world, whole, tmp_path):
    """The uninterrupted run's directory with checkpoint 20 the last one."""
    place = tmp_path / "interrupted"
    shutil.copytree(whole, place)
    for checkpoint in list_checkpoints(place / "out")[1:]:
        shutil.rmtree(checkpoint)
    return place


def resume(world, place, *flags, checkpoint=(), **train):
    return main(["train", *world.flags(place, "--resume_from_checkpoint", *checkpoint, *flags, **{**STEPS, **train})])


def test_resuming_drops_later_log_lines_and_an_unfinished_one(world, whole, interrupted):
    log = interrupted / "log" / "train.jsonl"
    with log.open("a", encoding="utf-8") as file:
        file.write('{"step": 24, "ki')
    before = list(log_lines_until(log, 20))
    assert resume(world, interrupted) == 0
    after = log.read_text(encoding="utf-8").splitlines()
    assert after[: len(before)] == before
    assert losses(interrupted) == losses(whole)


def log_lines_until(log, step):
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["step"] <= step:
            yield line


def test_resuming_with_another_micro_batch_reads_the_same_data(world, whole, interrupted):
    assert resume(world, interrupted, per_device_train_batch_size=8, logging_steps=2) == 0
    first, again = log_lines(whole)[-1], log_lines(interrupted)[-1]
    assert (first["tokens_seen"], first["targets_seen"]) == (again["tokens_seen"], again["targets_seen"])
    # Dropout draws other numbers for another shape, so the losses are near and no more.
    assert again["loss"] == pytest.approx(sum(losses(whole)[step] for step in (23, 24)) / 2, abs=0.05)
    assert [line["step"] for line in log_lines(interrupted)][-2:] == [22, 24]  # the new logging_steps holds


def test_a_finished_run_resumed_saves_its_model_again(world, whole, tmp_path):
    place = tmp_path / "finished"
    shutil.copytree(whole, place)
    (place / "out" / "model.safetensors").unlink()
    assert resume(world, place) == 0
    assert (place / "out" / "model.safetensors").read_bytes() == (whole / "out" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"learning_rate": 1e-3}, "train.learning_rate is 0.003 there and 0.001 here"),
        ({"seed": 1}, "train.seed is 233 there and 1 here"),
        ({"per_epoch_max_steps": 5}, "steps_per_epoch is 6 there and 5 here"),
        ({"sequences_per_step": 4}, "sequences_per_step is 8 there and 4 here"),
        ({"bf16": True}, "bf16 is False there and True here"),
    ],
)
def test_another_schedule_is_refused(world, interrupted, capsys, train, message):
    assert resume(world, interrupted, **train) == 1
    assert message in capsys.readouterr().err


def test_other_data_is_refused(world, interrupted, tmp_path, capsys):
    other = make_set(tmp_path / "other", world.tokenizer_path, world.tokenizer, train_rows=60)
    assert resume(world, interrupted, "--dataset_path", str(other)) == 1
    error = capsys.readouterr().err
    assert "rows is 50 there and 60 here" in error
    assert "data_sha256" in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "is a checkpoint of 'llama', not of 'doge_ifa'"),
        ({"vocab_size": 500}, "vocab_size is 500 there and 400 here"),
        ({"hidden_size": 64, "num_hidden_layers": 3}, "hidden_size is 64 there and 32 here; num_hidden_layers is 3"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(world, interrupted, capsys, change, message):
    path = list_checkpoints(interrupted / "out")[-1] / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, **change}), encoding="utf-8")
    RunRecord.read(path.parent).write(path.parent)  # as if it had been saved so
    assert resume(world, interrupted) == 1
    assert message in capsys.readouterr().err


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def write_garbage(path):
    path.write_bytes(b"garbage")


def open_a_brace(path):
    path.write_bytes(b"{")


def remove(path):
    path.unlink()


def add_a_number(path):
    path.write_text(path.read_text(encoding="utf-8").replace('"step": ', '"step": 1'), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        (truncate, "model.safetensors", "is damaged (it has "),
        (flip_a_byte, "model.safetensors", "is damaged (its sha256 is another"),
        (write_garbage, "optimizer.pt", "is damaged (it has 7 bytes and was written with "),
        (flip_a_byte, "optimizer.pt", "is damaged (its sha256 is another"),
        (remove, "optimizer.pt", "is missing"),
        (remove, "scheduler.pt", "is missing"),
        (open_a_brace, "trainer_state.json", "is damaged (it has 1 bytes"),
        (remove, "rng_state.pth", "is missing"),
        (open_a_brace, "config.json", "is damaged (it has 1 bytes"),
        (remove, "tokenizer.json", "is missing"),
        (open_a_brace, "run.json", "is damaged (Expecting "),
        (add_a_number, "run.json", "is damaged (its content does not fit its record_sha256"),
        (remove, "run.json", "is missing"),
    ],
)
def test_a_damaged_checkpoint_names_the_file_and_the_checkpoint_before(
    world, whole, tmp_path, capsys, damage, name, message
):
    place = tmp_path / "damaged"
    shutil.copytree(whole, place)
    before, last = list_checkpoints(place / "out")[-2:]
    damage(last / name)
    assert resume(world, place) == 1
    error = capsys.readouterr().err
    assert f"{last / name} {message}" in error
    assert f"give --resume_from_checkpoint {before} instead" in error


def test_the_checkpoint_that_is_offered_is_whole_and_can_be_resumed(world, whole, tmp_path, capsys):
    place = tmp_path / "damaged"
    shutil.copytree(whole, place)
    oldest, *later = list_checkpoints(place / "out")
    assert len(later) == 2
    for checkpoint in later:
        remove(checkpoint / "rng_state.pth")
    assert resume(world, place, checkpoint=[str(later[-1])]) == 1
    assert f"give --resume_from_checkpoint {oldest} instead" in capsys.readouterr().err
    assert resume(world, place, checkpoint=[str(oldest)]) == 0
    assert losses(place) == losses(whole)


def test_a_later_checkpoint_is_offered_where_none_is_before(world, whole, tmp_path, capsys):
    place = tmp_path / "damaged"
    shutil.copytree(whole, place)
    first, second, _ = list_checkpoints(place / "out")
    remove(first / "optimizer.pt")
    assert resume(world, place, checkpoint=[str(first)]) == 1
    assert f"give --resume_from_checkpoint {second} instead" in capsys.readouterr().err


def test_what_cannot_be_resumed_says_why(world, interrupted, tmp_path, capsys):
    assert resume(world, interrupted, checkpoint=[str(tmp_path / "none")]) == 1
    assert "there is no such directory" in capsys.readouterr().err
    (checkpoint,) = list_checkpoints(interrupted / "out")
    (checkpoint / "optimizer.pt").unlink()
    assert resume(world, interrupted) == 1
    assert "give --overwrite in place of --resume_from_checkpoint" in capsys.readouterr().err  # none is before it
    (checkpoint / "run.json").write_text('{"step": 20}', encoding="utf-8")
    assert resume(world, interrupted) == 1
    assert "is not a record that this version of doge-lm writes" in capsys.readouterr().err
    shutil.rmtree(checkpoint)
    assert resume(world, interrupted) == 1
    assert "holds no checkpoint to resume from" in capsys.readouterr().err
    assert resume(world, interrupted, "--overwrite") == 1
    assert "give one of the two" in capsys.readouterr().err


def test_a_record_must_list_the_random_numbers(world, interrupted, capsys):
    (checkpoint,) = list_checkpoints(interrupted / "out")
    (checkpoint / "rng_state.pth").unlink()
    RunRecord.read(checkpoint).write(checkpoint)
    assert resume(world, interrupted) == 1
    assert f"{checkpoint / 'run.json'} lists no rng_state*.pth" in capsys.readouterr().err


def test_targets_are_counted_exactly_however_many(world, whole, interrupted):
    """In float32, as the Trainer counts a step's targets, 2**24 + 1 is 2**24."""
    checkpoint = list_checkpoints(interrupted / "out")[-1]
    record = RunRecord.read(checkpoint)
    beyond = 2**40 + 1
    replace(record, targets_seen=record.targets_seen + beyond).write(checkpoint)
    assert resume(world, interrupted) == 0
    assert log_lines(interrupted)[-1]["targets_seen"] == log_lines(whole)[-1]["targets_seen"] + beyond


def test_a_checkpoint_older_than_a_setting_resumes_with_its_default_only(world, interrupted, capsys):
    checkpoint = list_checkpoints(interrupted / "out")[-1]
    record = RunRecord.read(checkpoint)
    del record.settings["train"]["lazy_expert_rows"]
    record.write(checkpoint)
    assert resume(world, interrupted, "--set", "lazy_expert_rows=true") == 1
    assert "train.lazy_expert_rows is False there and True here" in capsys.readouterr().err
    assert resume(world, interrupted) == 0

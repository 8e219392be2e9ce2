"""`data inspect`: the manifest as tables, rows with their boundaries and loss mask, and the picture."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import load_from_disk

from doge_lm.cli import main
from doge_lm.data import inspect
from doge_lm.data.cleaning import CleaningSettings
from doge_lm.data.manifest import Manifest, RawSource, SampleCounts
from doge_lm.data.merge import merge
from tests.data.conftest import conversation

Prepare = Callable[..., dict[str, Manifest]]
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def prepared(tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sources of text and one of conversations, tokenized and merged; also the current directory."""
    prepare(
        {
            "apple": [{"text": f"apple {n} " + "lorem ipsum " * (n % 50)} for n in range(60)],
            "pear": [{"text": f"pear {n} \x1b[31m 汉字"} for n in range(200)],
            "talk": [conversation(("human", f"{n} plus {n}"), ("gpt", f"it is {2 * n}")) for n in range(60)],
        },
        sequence_length=64,
    )
    merge(tmp_path, tmp_path, test_size=2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shown(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["data", "inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["data", "inspect", *map(str, arguments)]) == 1
    return capsys.readouterr().err


def test_tokenized_source(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = prepared / "tokenized" / "apple"
    manifest = Manifest.read(folder)
    text = shown(capsys, folder)
    counts = manifest.samples["all"]["apple"]
    assert manifest.tokenizer.sha256 in text
    assert re.search(r"documents in +60\n", text)
    assert f"{counts.text_bytes / counts.targets:.3f}" in text
    assert f"{manifest.inputs[0].bytes:,}  {manifest.inputs[0].sha256[:12]}\n" in text
    assert text.count("═══ sample") == 3
    assert "--tokenizer_path" in text
    assert "lorem" not in text
    assert (prepared / "apple-inspect.png").read_bytes().startswith(PNG_SIGNATURE)


def test_merged_set_shows_split_and_mixture(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = Manifest.read(prepared / "pretrain")
    text = shown(capsys, prepared / "pretrain", "--samples", "0", "--png", prepared / "mix.png")
    for split, sources in manifest.samples.items():
        for name, counts in sources.items():
            assert re.search(rf"{split} +{name} +{counts.samples:,} +{counts.pieces:,} +{counts.tokens:,} ", text)
    for name, entry in manifest.settings["mixture"].items():
        assert re.search(rf"{name} +{entry['tokens_there']:,} .* {entry['epochs']:.2f} ", text)
        assert manifest.settings["inputs"][name][1][:12] in text
    assert "sample " not in text
    assert (prepared / "mix.png").read_bytes().startswith(PNG_SIGNATURE)
    assert not (prepared / "pretrain-inspect.png").exists()


@pytest.mark.parametrize("padding", ["packed", "max_length"])
def test_the_empty_share_is_shown_whether_padding_is_stored_or_not(
    tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], padding: str
) -> None:
    prepare({"a": [{"text": "x " * n} for n in range(20, 40)]}, sequence_length=64, padding=padding)
    monkeypatch.chdir(tmp_path)
    rows = load_from_disk("tokenized/a")
    empty = 1 - sum(map(sum, rows["document_lengths"])) / (64 * len(rows))
    assert empty > 0.01
    stored = sum(map(len, rows["input_ids"])) - sum(map(sum, rows["document_lengths"]))
    assert (stored > 0) == (padding == "max_length")
    text = shown(capsys, "tokenized/a", "--samples", "0")
    assert re.search(rf"\nall +a .* {stored:,} +{empty:.2%} +[\d.]+\n", text)


@pytest.mark.parametrize("known", [False, True])
def test_the_first_drawing_says_why_it_takes_long(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], known: bool
) -> None:
    monkeypatch.setattr("matplotlib.get_cachedir", lambda: str(prepared))
    if known:
        (prepared / "fontlist-v390.json").touch()
    assert main(["data", "inspect", "pretrain", "--samples", "0"]) == 0
    assert ("matplotlib looks for fonts" in capsys.readouterr().err) != known


def test_what_was_dropped_and_the_settings_are_shown_in_words(
    tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"number {n} of many"} for n in range(400)]
    benchmark = tmp_path / "benchmark.jsonl"
    benchmark.write_text('{"query": "some words that stand nowhere else at all"}', encoding="utf-8")
    cleaning = CleaningSettings(decontaminate=(benchmark,), ngram_words=5)
    sources = {"a": [*rows, {"title": "b"}], "b": rows}
    prepare(sources, sequence_length=64, on_error="skip", cleaning=cleaning)
    merge(tmp_path, tmp_path, test_size=2)
    monkeypatch.chdir(tmp_path)
    for folder in ("tokenized/a", "pretrain"):
        text = shown(capsys, folder, "--samples", "0")
        assert "a: dropped, field that is missing or of a wrong type: 1 times, 14 bytes, – tokens\n" in text
        assert f"\n  the first: {tmp_path / 'own' / 'a.jsonl'}, line 401: the field `text` is missing" in text
        assert re.search(r"\ntext done at a time, bytes +16777216", text)
        assert re.search(r"\ntrain_on_prompts +no", text)
        assert re.search(r"\ndecontaminate +benchmark\.jsonl [0-9a-f]{12}", text)
        assert re.search(r"\nngram_words +5", text)
        assert "null" not in text
        assert "ngram_rule" not in text
    assert re.search(r"\nsettings of the sources +a +b\n", text)
    assert re.search(r"\non_error +skip +-\n", text)
    assert re.search(r"\nmix +none\n", text)
    assert re.search(r"\nsamples the test set was chosen among +all\n", text)


def test_rows_show_boundaries_and_loss_mask(
    prepared: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, prepared / "finetune", "--tokenizer_path", tokenizer_path, "--samples", "1000")
    rows = load_from_disk(str(prepared / "finetune"))["train"]
    pieces = sum(map(len, rows["document_lengths"]))
    assert text.count("─── piece") == pieces
    found = re.findall(r"⟦‹<s>›‹\[INST\]› ?(\d+) plus \1‹\[/INST\]›⟧ ?it is (\d+)‹</s>›", text)
    assert len(found) == pieces
    assert all(2 * int(asked) == int(answer) for asked, answer in found)


def test_control_characters_do_not_reach_the_terminal(
    prepared: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, prepared / "tokenized" / "pear", "--tokenizer_path", tokenizer_path)
    assert "\x1b" not in text
    assert r"\x1b[31m 汉字‹</s>›" in text


def test_marks_follow_the_columns(tokenizer: Any) -> None:
    """A piece that begins a document, with context in its middle, one that continues one, and padding."""
    ids = np.array([1, *tokenizer.encode(" one two three", add_special_tokens=False)], np.uint16)
    assert len(ids) == 5  # <s>, a space, and three words
    row = inspect.Row(
        0,
        "made",
        np.concatenate([ids, ids[-2:], np.zeros(3, np.uint16)]),
        np.array([5, 2], np.int32),
        np.array([3, 4], np.int32),
    )
    header, begins, first, continues, second = inspect.show_row(row, 1, tokenizer).split("\n")
    assert "7 tokens, pieces: 2, targets: 4, padding: 3" in header
    assert begins.endswith("begins a document")
    assert first == "⟦‹<s>›⟧ one⟦ two⟧ three"
    assert continues.endswith("continues a document")
    assert second == "⟦ two⟧ three"
    spans = inspect.show_row(row, 1, None).split("\n")
    assert [line.strip() for line in spans[2::2]] == ["not predicted: tokens 0-0, 3-3", "not predicted: tokens 0-0"]


def test_samples_are_fixed_by_the_seed(prepared: Path) -> None:
    folder = prepared / "tokenized" / "pear"
    files = Manifest.read(folder).files
    drawn = [[row.number for row in inspect.sample_rows(folder, files, 5, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 5
    rows = load_from_disk(str(folder)).with_format("numpy")
    for row in inspect.sample_rows(folder, files, 5, 0):
        np.testing.assert_array_equal(row.input_ids, rows[row.number]["input_ids"])


def test_lengths_are_those_of_all_pieces(prepared: Path) -> None:
    folder = prepared / "tokenized" / "apple"
    manifest = Manifest.read(folder)
    counted = inspect.piece_lengths(folder, manifest.files, manifest.sequence_length)
    lengths = [length for row in load_from_disk(str(folder)) for length in row["document_lengths"]]
    np.testing.assert_array_equal(counted, np.bincount(lengths, minlength=65))
    assert counted.sum() == manifest.samples["all"]["apple"].pieces


def test_many_inputs_are_summed_up(prepared: Path) -> None:
    folder = prepared / "tokenized" / "apple"
    manifest = Manifest.read(folder)
    manifest.inputs = manifest.inputs * 12
    text = inspect.describe(folder, manifest)
    assert f"... and 2 more, {2 * manifest.inputs[0].bytes:,} bytes" in text


def test_another_tokenizer_is_refused(prepared: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = prepared / "other"
    shutil.copytree(tokenizer_path, other)
    file = other / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    message = refused(capsys, prepared / "pretrain", "--tokenizer_path", other)
    assert str(other) in message
    assert "not the tokenizer that made" in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nothing"], "nothing/manifest.json does not exist"),
        (["tokenized/apple", "--split", "test"], "--split test"),
        (["pretrain", "--split", "dev"], "only train, test"),
        (["pretrain", "--samples", "-1"], "--samples -1"),
        (["pretrain", "--png", "nowhere/x.png"], "--png nowhere/x.png"),
        (["pretrain", "--png", "x.pdf"], "--png x.pdf: the picture is a PNG"),
        (["pretrain/test"], "pretrain/test is a split of a merged set; give pretrain --split test"),
        (["tokenized"], "give one of them: tokenized/apple, tokenized/pear, tokenized/talk"),
        (["."], "give one of them: finetune, pretrain, raw/apple"),
    ],
)
def test_wrong_arguments(
    prepared: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert expected in refused(capsys, *arguments)


def test_a_source_that_is_not_tokenized_yet(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "raw/apple")
    source = RawSource.read(prepared / "raw" / "apple")
    assert re.search(r"kind +pretrain\n", text)
    assert "not tokenized yet" in text
    assert source.origin in text
    assert f"{source.files[0].path}  {source.files[0].bytes:,} " in text


def test_a_tokenizer_is_no_set(prepared: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is a tokenizer; give it as --tokenizer_path" in refused(capsys, tokenizer_path)


def test_numbers_of_the_picture_are_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *args, **kwargs: figures.append(figure))
    lengths = np.zeros(2049, np.int64)
    lengths[-1] = 12_345_678
    inspect.draw(tmp_path / "x.png", "title", lengths, {"one": SampleCounts(tokens=25_000_000_000)})
    figures[0].draw_without_rendering()
    left, right = figures[0].axes
    labels = [{label.get_text() for label in axis.get_ticklabels()} for axis in (left.xaxis, left.yaxis, right.xaxis)]
    assert "1,000" in labels[0]
    assert "10,000,000" in labels[1]
    assert "24,000,000,000" in labels[2]


def test_damaged_file(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = prepared / "tokenized" / "pear" / Manifest.read(prepared / "tokenized" / "pear").files[0].path
    file.write_bytes(file.read_bytes()[:-8])
    message = refused(capsys, "tokenized/pear")
    assert str(Path("tokenized/pear") / file.name) in message
    assert "truncated" in message

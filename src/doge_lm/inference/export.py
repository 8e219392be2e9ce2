"""`doge-lm export MODEL --output_dir DIR`: a trained model in another form, checked before it is put in place.

The form is a directory for transformers (of another type, with an adapter merged in, or with 8-bit or 4-bit weights),
or one for onnxruntime. What was written is loaded again and compared with the model in memory; only then does the
directory take its place, with `export.json`, which says what it was made from and how far its predictions moved.
"""

import argparse
import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from math import log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from .. import __version__
from ..data.manifest import atomic_directory
from ..data.tokenizer import encode_text, load_tokenizer
from ..errors import UserError
from ..model import DogeForCausalLM
from .loading import choose_path, load_model

RECORD_NAME = "export.json"
ADAPTER_NAME = "adapter_config.json"
MERGE_TOLERANCE = 1e-4
"""Relative error of logits between a model with its adapter beside it and merged, in float32."""
_PACKAGES = ("torch", "transformers", "peft", "torchao", "bitsandbytes", "onnx", "onnxscript", "onnxruntime")

# What the check reads: the scripts that models of this project know, of different lengths, so that padding is needed.
_CHECK_TEXTS = (
    "The quick brown fox jumps over the lazy dog. In the year 1984, about 12% of all foxes did so twice a day.",
    "从前有座山，山里有座庙，庙里有个老和尚在给小和尚讲故事。",
    "def add(left: int, right: int) -> int:\n    return left + right\n",
)


@dataclass(frozen=True)
class Change:
    """How far the predictions of an export lie from those of the original, on a few lines of text.

    Attributes:
        relative_error: ‖logits - original's‖ / ‖original's‖.
        bits_a_token: the Kullback-Leibler divergence of the next token's distribution, the mean over tokens.
        same_choice: the share of tokens behind which both find the same next token the likeliest.
    """

    relative_error: float
    bits_a_token: float
    same_choice: float


def run(args: argparse.Namespace) -> int:
    """Run `doge-lm export`."""
    logging.disable_progress_bar()
    change = export(
        args.model,
        args.output_dir,
        file_format=args.format,
        dtype=args.dtype,
        quantize=args.quantize,
        base_model=args.base_model,
        overwrite=args.overwrite,
    )
    size = sum(path.stat().st_size for path in args.output_dir.rglob("*") if path.is_file())
    print(
        f"{args.output_dir}: {size / 1e6:,.1f} MB; beside the original, in float32, its logits differ by "
        f"{change.relative_error:.1e}, its predictions by {change.bits_a_token:.4f} bits a token, and the likeliest "
        f"token is the same for {change.same_choice:.1%} (on a few lines; measure with doge-lm eval)"
    )
    return 0


def export(
    model_dir: Path,
    output_dir: Path,
    *,
    file_format: str = "transformers",
    dtype: str = "auto",
    quantize: str | None = None,
    base_model: Path | None = None,
    overwrite: bool = False,
) -> Change:
    """Write a model in another form, whole and checked or not at all.

    Args:
        model_dir: a model with its tokenizer, or an adapter.
        output_dir: is made; one that holds anything is refused, or with `overwrite` replaced if it is an export.
        file_format: one of `flags.EXPORT_FORMATS`.
        dtype: one of `flags.DTYPES`.
        quantize: one of `flags.EXPORT_KINDS`, or None.
        base_model: what an adapter is merged into.
        overwrite: replace an earlier export.

    Returns:
        How far its predictions lie from the original's in float32.

    Raises:
        UserError: for settings that do not go together, a model that cannot be exported so, an output directory that
            is in use, too little space, or a result that is not what was exported.
    """
    _check_settings(model_dir, output_dir, file_format, dtype, quantize, base_model, overwrite)
    model, own_type = _open(model_dir, base_model)
    tokenizer = load_tokenizer(_tokenizer_place(model_dir, base_model))
    kind = own_type if dtype == "auto" else getattr(torch, dtype)
    check = _check_batch(tokenizer, model)
    original = _logits(model, check)
    _check_space(output_dir, model, quantize is not None)
    with atomic_directory(output_dir, mark=RECORD_NAME, flag="--output_dir") as staged:
        if file_format == "onnx":
            found = _write_onnx(model, staged, check)
        elif quantize is None:
            found = _write_plain(model.to(kind), staged, check)
        else:
            found = _write_quantized(model.to(kind), staged, quantize, kind, check)
        tokenizer.save_pretrained(staged)
        change = _change(found, original, check[1])
        record = {
            "model": str(model_dir),
            "format": file_format,
            "dtype": "float32" if file_format == "onnx" else str(kind).removeprefix("torch."),
            "quantize": quantize,
            "change": asdict(change),
            "versions": _versions(),
        }
        text = json.dumps(record, ensure_ascii=False, indent=2) + "\n"
        (staged / RECORD_NAME).write_text(text, encoding="utf-8", newline="\n")
    return change


def _check_settings(
    model_dir: Path,
    output_dir: Path,
    file_format: str,
    dtype: str,
    quantize: str | None,
    base_model: Path | None,
    overwrite: bool,
) -> None:
    """What can be refused before anything is loaded."""
    if file_format == "onnx" and quantize is not None:
        raise UserError(
            "--quantize is for --format transformers; leave it out, and quantize model.onnx by onnxruntime.quantization"
        )
    if file_format == "onnx" and dtype not in ("auto", "float32"):
        raise UserError(
            f"--format onnx is written in float32, which onnxruntime runs everywhere; leave --dtype {dtype} out"
        )
    if base_model is not None and not (model_dir / ADAPTER_NAME).is_file():
        raise UserError(
            f"--base_model is for an adapter, and {model_dir} is none (no {ADAPTER_NAME} there); leave it out"
        )
    sources = [place.resolve() for place in (model_dir, base_model) if place is not None]
    if output_dir.resolve() in sources:
        raise UserError(f"--output_dir {output_dir} is what is to be exported; choose another place")
    if not overwrite and output_dir.is_dir() and any(output_dir.iterdir()):
        raise UserError(
            f"--output_dir {output_dir} is not empty; choose another place, or give --overwrite if it is an export"
        )


# ---------------------------------------------------------------------------------------------------------------
# Opening
# ---------------------------------------------------------------------------------------------------------------


def _open(model_dir: Path, base_model: Path | None) -> tuple[DogeForCausalLM, torch.dtype]:
    """The model in float32, with an adapter merged in, and the type of the checkpoint."""
    base = _base_of(model_dir, base_model)
    place = model_dir if base is None else base
    if place.is_dir() and (place / ADAPTER_NAME).is_file() and not (place / "config.json").is_file():
        raise UserError(f"{place} is an adapter itself; merge it first, with doge-lm export {place}")
    model = load_model(place, torch.device("cpu"), "auto")
    if not isinstance(model, DogeForCausalLM):
        raise UserError(f"{place} holds a {type(model).__name__}; doge-lm export takes Doge models")
    if getattr(model.config, "quantization_config", None) is not None:
        raise UserError(f"the weights in {place} are quantized already; export from the model that they were made from")
    own_type = model.dtype
    model = model.float()
    return (model if base is None else _merged(model, model_dir)), own_type


def _base_of(model_dir: Path, base_model: Path | None) -> Path | None:
    """Where the model of an adapter lies; None if there is no adapter."""
    file = model_dir / ADAPTER_NAME
    if not file.is_file():
        return None
    if base_model is not None:
        return base_model
    try:
        named = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} does not name the model of the adapter; give it with --base_model") from error
    if not isinstance(named, str) or not (Path(named) / "config.json").is_file():
        raise UserError(f"{file} names {named!r} as its model, which is not there; give its place with --base_model")
    return Path(named)


def _merged(model: DogeForCausalLM, adapter_dir: Path) -> DogeForCausalLM:
    """The model with an adapter in its weights; that nothing but rounding changes is checked."""
    import peft  # noqa: PLC0415  (optional, and for adapters alone)

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = peft.PeftModel.from_pretrained(model, adapter_dir).eval()
    except (ValueError, KeyError, TypeError, OSError, RuntimeError, UserWarning) as error:
        raise UserError(
            f"the adapter in {adapter_dir} does not fit its model: {type(error).__name__}: {error}; give the model "
            "that it was trained on with --base_model"
        ) from error
    if not hasattr(adapted.base_model, "merge_and_unload"):
        kind = adapted.active_peft_config.peft_type
        raise UserError(f"the adapter in {adapter_dir} is of the kind {kind}, which cannot be merged into weights")
    ids = torch.randint(model.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    check = ids, torch.ones_like(ids)
    expected = _logits(adapted, check)
    merged = adapted.merge_and_unload(safe_merge=True)
    difference = _relative_error(_logits(merged, check), expected)
    if not difference <= MERGE_TOLERANCE:
        raise UserError(
            f"merging the adapter in {adapter_dir} changes the logits by {difference:.1e}, more than rounding does, so "
            "nothing was written; this is a bug of doge-lm or of peft, please report it"
        )
    return merged


def _tokenizer_place(model_dir: Path, base_model: Path | None) -> Path:
    """An adapter may bring its tokenizer."""
    base = _base_of(model_dir, base_model)
    return model_dir if base is None or (model_dir / "tokenizer.json").is_file() else base


# ---------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------


def _write_plain(model: DogeForCausalLM, staged: Path, check: tuple[Tensor, Tensor]) -> Tensor:
    """Weights, settings and the model's code; the logits of what was written."""
    model.save_pretrained(staged)
    return _read_back(model, staged, check)


def _write_quantized(
    model: DogeForCausalLM, staged: Path, kind: str, dtype: torch.dtype, check: tuple[Tensor, Tensor]
) -> Tensor:
    """As `_write_plain`, with linear maps of few bits.

    Embeddings and the tables of experts stay as they are: of these, few rows are read for a token, and neither
    library reads some rows of a quantized table without unpacking all.
    """
    plain = staged / "plain"
    model.save_pretrained(plain)
    quantized = DogeForCausalLM.from_pretrained(
        plain, dtype=dtype, quantization_config=_quantization(kind, dtype, model.config.tie_word_embeddings),
        device_map="cpu",
    ).eval()  # fmt: skip
    choose_path(quantized, torch.device("cpu"))
    shutil.rmtree(plain)
    quantized.save_pretrained(staged)
    return _read_back(quantized, staged, check)


def _quantization(kind: str, dtype: torch.dtype, tied: bool) -> Any:
    """How transformers is to quantize, the head included where it is not the embedding as well."""
    left_out = ["lm_head"] if tied else []
    if kind == "int8":
        _needs("torchao")
        from torchao.quantization import Int8WeightOnlyConfig  # noqa: PLC0415  (optional)
        from transformers import TorchAoConfig  # noqa: PLC0415

        return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False), modules_to_not_convert=left_out)
    # torchao has no 4-bit layout that a CPU runs and that safetensors hold alike on every machine.
    _needs("bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=left_out,
    )


def _needs(package: str) -> None:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError as error:
        raise UserError(
            f"--quantize needs the package {package}; install it with: pip install 'doge-lm[export]'"
        ) from error


def _read_back(model: DogeForCausalLM, staged: Path, check: tuple[Tensor, Tensor]) -> Tensor:
    """The logits of what was written, which must be those of the model in memory to the bit."""
    again = load_model(staged, torch.device("cpu"), "auto")
    found, expected = _logits(again, check), _logits(model, check)
    if not torch.equal(found, expected):
        raise UserError(
            f"what was written does not load as the same model (its logits differ by "
            f"{_relative_error(found, expected):.1e}), so nothing was put in place; this is a bug of doge-lm or of a "
            "library, please report it"
        )
    return found


def _write_onnx(model: DogeForCausalLM, staged: Path, check: tuple[Tensor, Tensor]) -> Tensor:
    """`model.onnx` and the model's settings; the logits by onnxruntime."""
    from .onnx_model import TOLERANCE, OnnxRunner, export_onnx, largest_error  # noqa: PLC0415  (optional)

    export_onnx(model, staged)
    model.config.to_json_file(staged / "config.json")  # without the model's code, which is of no use here
    if model.generation_config is not None:
        model.generation_config.save_pretrained(staged)
    runner = OnnxRunner(staged)
    ids, mask = check
    rows = [row[seen.bool()].tolist() for row, seen in zip(ids, mask, strict=True)]
    error = largest_error(model, runner, rows)
    if not error <= TOLERANCE:
        raise UserError(
            f"onnxruntime computes other logits than PyTorch (by {error:.1e}), so nothing was put in place; this is a "
            "bug of doge-lm or of a library, please report it"
        )
    runner.reset()
    return torch.from_numpy(runner.logits(ids.numpy(), mask.numpy()))


# ---------------------------------------------------------------------------------------------------------------
# Checking
# ---------------------------------------------------------------------------------------------------------------


def _check_batch(tokenizer: PreTrainedTokenizerFast, model: DogeForCausalLM) -> tuple[Tensor, Tensor]:
    """The check's texts as ids (B, T), on the right, and their mask."""
    most = model.config.max_position_embeddings
    rows = [[tokenizer.bos_token_id, *encode_text(tokenizer, text)][:most] for text in _CHECK_TEXTS]
    highest = max(map(max, rows))
    if highest >= model.config.vocab_size:
        raise UserError(
            f"the tokenizer gives the id {highest}, and the model knows {model.config.vocab_size}: they do not belong "
            "together"
        )
    return _left_padded(rows)


def _left_padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@torch.no_grad()
def _logits(model: Any, check: tuple[Tensor, Tensor]) -> Tensor:
    ids, mask = check
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _change(found: Tensor, original: Tensor, mask: Tensor) -> Change:
    """Over all tokens but padding."""
    found, original = found[mask.bool()], original[mask.bool()]
    log_p, log_q = original.log_softmax(dim=-1), found.log_softmax(dim=-1)
    nats = (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()
    same = (found.argmax(dim=-1) == original.argmax(dim=-1)).float().mean()
    return Change(_relative_error(found, original), max(0.0, float(nats)) / log(2), float(same))


def _check_space(output_dir: Path, model: DogeForCausalLM, twice: bool) -> None:
    """Whether there is room for the weights in float32, and for a plain copy while they are quantized."""
    existing = next(place for place in (output_dir, *output_dir.absolute().parents) if place.exists())
    needed = sum(4 * parameter.numel() for parameter in model.parameters()) * (2 if twice else 1)
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"--output_dir {output_dir}: exporting takes up to {needed / 1e6:,.0f} MB and only {free / 1e6:,.0f} are "
            "free; free some space or choose another place"
        )


def _versions() -> dict[str, str]:
    found = {"doge-lm": __version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found

"""What fine-tuning and preference tuning share: the model to start from, LoRA, TRL's trainers under this project's."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from doge_lm.errors import UserError
from doge_lm.inference.loading import load_model
from doge_lm.model.configuration_doge import DogeConfig
from doge_lm.training.run import ADAPTER
from doge_lm.training.settings import LoraSettings, TrainSettings
from doge_lm.training.trainer import DogeTrainer

_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def refuse_for_adapters(train: TrainSettings, lora: LoraSettings) -> None:
    """Refuse what makes no sense where adapters are trained.

    Raises:
        UserError: naming the keys.
    """
    if lora.rank and train.lazy_expert_rows:
        raise UserError("lazy_expert_rows: true is for training all weights; set it to false, or lora.rank to 0")
    if lora.rank and train.optimizer == "muon":
        raise UserError("optimizer: muon is for training all weights; set it to adamw, or lora.rank to 0")


def base_config(path: Path) -> DogeConfig:
    """The configuration of a model to start from.

    Raises:
        UserError: if there is none, or it is of another architecture.
    """
    file = path / "config.json"
    if not file.is_file():
        raise UserError(
            f"{path} holds no model (no config.json there); give --model_path the output of `doge-lm train`"
        )
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("model_type")
        if kind == DogeConfig.model_type:
            return DogeConfig.from_pretrained(path)
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error})") from error
    raise UserError(f"{path} holds a model of the type {kind!r}; only a Doge ({DogeConfig.model_type!r}) can be tuned")


def base_sha256(path: Path) -> str:
    """Stands for the weights of a model.

    Raises:
        UserError: if there are none in safetensors' format.
    """
    files = sorted(path.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{path} holds no weights (no model.safetensors there); give --model_path a whole model")
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def load_base(path: Path, train: TrainSettings, lora: LoraSettings) -> PreTrainedModel:
    """The model to start from in float32, with adapters if `lora` has a rank; then only these are trained.

    Raises:
        UserError: if it cannot be loaded, or has none of the modules that adapters are for.
    """
    model = load_model(path, torch.device("cpu"), "float32")
    model.set_attn_implementation(train.attn_implementation)
    if lora.rank == 0:
        return model
    from peft import LoraConfig  # noqa: PLC0415 (only where it is asked for)

    adapter = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_present(model, lora),
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(path),
    )
    # Within the model and not around it: it keeps its class, and is compiled and decoded as ever.
    model.add_adapter(adapter)
    return model


def _present(model: PreTrainedModel, lora: LoraSettings) -> list[str]:
    """The targets that the model has: an option may have left one out (`router_queries`) or not put it in."""
    there = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    present = [name for name in lora.names if name in there]
    if not present:
        raise UserError(f"lora.targets: the model has none of {', '.join(lora.names)}")
    return present


class TuningTrainer(DogeTrainer):
    """`DogeTrainer` over a trainer of TRL, for all weights or an adapter.

    Args:
        base_path: the model that was started from.
        lora: of the run.
        keyword: those of `DogeTrainer`.
    """

    def __init__(self, *, base_path: Path, lora: LoraSettings, **keyword: Any):
        self.base_path, self.lora = base_path, lora
        super().__init__(**keyword)
        self.model.model_tags = None  # TRL's

    def base_dataset(self) -> Any:
        """TRL asks for a `datasets.Dataset`, and looks at its first row."""
        rows = self.data.train
        return rows.dataset if hasattr(rows, "dataset") else rows

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """TRL would write one with every checkpoint, about a model of the hub."""

    def save_model_files(self, directory: Path) -> None:
        """The model; of LoRA the merged one, and the adapter in a folder beside it."""
        if self.lora.rank == 0:
            self.save_weights(directory)
            return
        from peft import PeftModel  # noqa: PLC0415

        adapter = directory / ADAPTER
        self.model.save_pretrained(adapter)
        base = load_model(self.base_path, torch.device("cpu"), "float32")
        merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
        merged.save_pretrained(directory)
        self.save_tokenizer(directory)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.lora.rank == 0:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        from peft import set_peft_model_state_dict  # noqa: PLC0415

        saved = load_file(Path(resume_from_checkpoint) / _ADAPTER_WEIGHTS)
        weights = {name.removeprefix(_PREFIX): weight for name, weight in saved.items()}
        result = set_peft_model_state_dict(self.model, weights)
        if result is not None and result.unexpected_keys:
            raise UserError(f"{resume_from_checkpoint} is of other adapters: {', '.join(result.unexpected_keys[:3])}")

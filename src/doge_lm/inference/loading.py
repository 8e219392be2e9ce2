"""Opens a trained model and its tokenizer, of this architecture or another, on a device."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..data.tokenizer import load_tokenizer
from ..errors import UserError
from ..model import DogeForCausalLM  # importing it registers doge_ifa with the Auto classes
from ..model.modeling_doge import DogeCDMoE


def pick_device(name: str) -> torch.device:
    """A device by name; "auto" takes an accelerator where there is one.

    Raises:
        UserError: for a device that this machine lacks.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a device that cannot compute fails here
    except (RuntimeError, AssertionError) as error:
        available = "cpu" if accelerator is None else f"cpu, {accelerator.type}"
        reason = str(error).partition("\n")[0].partition(":")[0]
        raise UserError(f"--device {name} cannot be used here ({reason}); this machine has: {available}") from error
    return device


def load_model(path: Path, device: torch.device, dtype: str = "auto") -> PreTrainedModel:
    """Load a checkpoint for inference.

    Raises:
        UserError: if `path` holds no model, or one that neither this package nor transformers knows; for a type of
            its own for a quantized one.
    """
    if not (path / "config.json").is_file():
        raise UserError(f"{path} holds no model (no config.json there); give the --output_dir of `doge-lm train`")
    if dtype != "auto" and _is_quantized(path / "config.json"):
        raise UserError(
            f"the weights in {path} are quantized, which fixes the type of the others; leave --dtype {dtype} out"
        )
    try:
        # Code of a checkpoint is never run, nor is the user asked, on a standard input that is for something else.
        model, loading = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
    except (ValueError, KeyError, AttributeError, OSError, RuntimeError, ImportError, SafetensorError) as error:
        # transformers reports sizes that do not fit as RuntimeError, a foreign config in any of these ways, and as
        # ImportError that the library of quantized weights is not there.
        raise UserError(f"the model in {path} cannot be loaded: {type(error).__name__}: {error}") from error
    if loading["missing_keys"]:  # transformers would go on with random weights in their place
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise UserError(f"the model in {path} lacks {len(loading['missing_keys'])} weights ({missing}, …)")
    choose_path(model, device)
    return model.to(device).eval()


def choose_path(model: PreTrainedModel, device: torch.device) -> None:
    """Let a Doge whose experts are to be computed by kernels for a GPU run on another device too.

    Its configuration stays as it is, and every path gives the same result.
    """
    if isinstance(model, DogeForCausalLM) and model.config.cdmoe_path == "sparse" and device.type != "cuda":
        for module in model.modules():
            if isinstance(module, DogeCDMoE):
                module.path = "auto"


def _is_quantized(config: Path) -> bool:
    try:
        return "quantization_config" in json.loads(config.read_text(encoding="utf-8"))
    except ValueError:  # transformers says what is wrong with it
        return False


def load_model_tokenizer(path: Path, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model: this project's for a Doge, whatever transformers finds for another.

    Raises:
        UserError: if there is none, or a broken one.
    """
    if isinstance(model, DogeForCausalLM):
        return load_tokenizer(path)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # whatever transformers and `tokenizers` stumble over
        raise UserError(f"the tokenizer in {path} cannot be loaded: {type(error).__name__}: {error}") from error

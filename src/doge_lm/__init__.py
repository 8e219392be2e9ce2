"""doge-lm: train a small language model of the Doge architecture from raw text to a chat model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import DogeConfig, DogeForCausalLM, DogeModel

__version__ = "0.1.0"
__all__ = ["DogeConfig", "DogeForCausalLM", "DogeModel"]


def __getattr__(name: str) -> Any:
    # On demand: `doge-lm --help` and the data workers need neither torch nor transformers.
    if name in __all__:
        return getattr(import_module(".model", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

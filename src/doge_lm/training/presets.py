"""Where the settings that come with the project are."""

from pathlib import Path

import doge_lm

FINETUNE, DPO = "finetune", "dpo"
"""Folders of presets, each named after its stage; those of pre-training lie above them."""


def preset_paths(folder: str = "") -> dict[str, Path]:
    """The presets of a folder by name: of the checkout where the package runs from one, else those in the package."""
    package = Path(doge_lm.__file__).resolve().parent
    checkout, installed = package.parents[1] / "model" / "config", package / "config"
    directory = installed if installed.is_dir() else checkout
    return {path.stem: path for path in sorted((directory / folder).glob("*.yaml"))}

"""The optimizer that the settings ask for: which parameters it updates how, at which learning rate and decay."""

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel, Trainer

from doge_lm.errors import UserError
from doge_lm.training.muon import Muon, hidden_matrices
from doge_lm.training.plan import EXPERT_TABLES
from doge_lm.training.row_lazy_adamw import RowLazyAdamW
from doge_lm.training.settings import TrainSettings


class _Treatment(NamedTuple):
    """What the parameters of a group have in common: `way` ("adamw", "muon" or "lazy"), and factors on the settings."""

    way: str
    decay: float
    rate: float


def is_plain_adamw(train: TrainSettings) -> bool:
    """Whether transformers' own AdamW does all that the settings ask for."""
    scales = train.learning_rate_scales or train.weight_decay_scales
    return train.optimizer == "adamw" and not train.lazy_expert_rows and not scales


def decayed_names(model: nn.Module) -> set[str]:
    """Names of the parameters that transformers' own AdamW would let decay: all but those of norms and biases."""
    # The method looks at the model alone; settings are checked while there is no Trainer yet.
    return set(Trainer.get_decay_parameter_names(None, model))


def make_optimizer(model: PreTrainedModel, train: TrainSettings, decayed: Collection[str]) -> RowLazyAdamW:
    """Muon for the matrices, lazy rows for the tables of experts, and fused AdamW, as the settings have it.

    The first group is AdamW's at `learning_rate` itself, though it may be empty: its learning rate is what is logged.

    Args:
        model: what is trained.
        train: the settings.
        decayed: names of parameters that have weight decay.

    Raises:
        UserError: as `learning_rate_factors` and `weight_decay_factors`.
    """
    betas = (train.adam_beta1, train.adam_beta2)
    kind = Muon if train.optimizer == "muon" else RowLazyAdamW
    return kind(_groups(model, train, decayed), train.learning_rate, betas, train.adam_epsilon)


def check_optimizer(model: PreTrainedModel, train: TrainSettings) -> None:
    """Find what `make_optimizer` would refuse, and lazy rows of a model without experts, while no file has changed.

    Raises:
        UserError: as `learning_rate_factors` and `weight_decay_factors`; or if rows of experts are to be lazy and there
            are no experts.
    """
    learning_rate_factors(model, train.learning_rate_scales)
    weight_decay_factors(model, train.weight_decay_scales, decayed_names(model))
    if train.lazy_expert_rows and getattr(model.config, "num_cdmmoe_experts", None) == 0:
        raise UserError(
            "lazy_expert_rows is true, but the model has no experts (num_cdmmoe_experts is 0): set it to false"
        )


def learning_rate_factors(model: PreTrainedModel, scales: Mapping[str, float] | None) -> dict[str, float]:
    """What the learning rate of each trained parameter is multiplied by, by its name.

    Of several parts that are in a name, the longest counts.

    Args:
        model: what is trained.
        scales: factors by parts of names.

    Raises:
        UserError: if nothing takes its factor from a part, or two of the same length are in a name.
    """
    scales = scales or {}
    parts = _parts_by_name(model, "learning_rate_scales", scales)
    return {name: 1.0 if part is None else scales[part] for name, part in parts.items()}


def weight_decay_factors(
    model: PreTrainedModel, scales: Mapping[str, float] | None, decayed: Collection[str]
) -> dict[str, float]:
    """What the weight decay of each trained parameter is multiplied by, by its name; 0 for what has none anyway.

    Of several parts that are in a name, the longest counts.

    Args:
        model: what is trained.
        scales: factors by parts of names.
        decayed: names of parameters that have weight decay.

    Raises:
        UserError: if nothing, or nothing that has weight decay, takes its factor from a part, or two of the same length
            are in a name.
    """
    scales = scales or {}
    parts = _parts_by_name(model, "weight_decay_scales", scales)
    for part in scales:
        takers = [name for name, chosen in parts.items() if chosen == part]
        if not any(name in decayed for name in takers):
            raise UserError(
                f"weight_decay_scales: {part!r} gives its factor only to parameters that have no weight decay anyway, "
                f"as norms and biases: {', '.join(_examples(takers))}"
            )
    return {name: 0.0 if name not in decayed else 1.0 if part is None else scales[part] for name, part in parts.items()}


def _parts_by_name(model: PreTrainedModel, key: str, scales: Mapping[str, float]) -> dict[str, str | None]:
    """For each trained parameter the part that it takes its factor from; `key` is the setting that errors name."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    parts = {name: _longest_within(name, scales, key) for name in names}
    for part in scales:
        if part not in parts.values():
            raise UserError(
                f"{key}: nothing takes its factor from {part!r}, as it is in the name of no parameter "
                f"that is trained, or only beside a longer part; names are {', '.join(_examples(names))}"
            )
    return parts


def _longest_within(name: str, parts: Collection[str], key: str) -> str | None:
    found = sorted((part for part in parts if part in name), key=len)
    if len(found) > 1 and len(found[-1]) == len(found[-2]):
        raise UserError(
            f"{key}: {found[-2]!r} and {found[-1]!r} are both in {name} and equally long; the longest "
            "part counts, so lengthen one of them"
        )
    return found[-1] if found else None


def _examples(names: Collection[str]) -> list[str]:
    """Of layers that are alike, the names of the first alone."""
    return list({re.sub(r"\d+", "", name): name for name in reversed(list(names))}.values())[::-1]


def _groups(model: PreTrainedModel, train: TrainSettings, decayed: Collection[str]) -> list[dict[str, Any]]:
    rates = learning_rate_factors(model, train.learning_rate_scales)
    decays = weight_decay_factors(model, train.weight_decay_scales, decayed)
    matrices = hidden_matrices(model) if train.optimizer == "muon" else ()
    members: dict[_Treatment, list[nn.Parameter]] = {
        _Treatment("adamw", decay=1.0, rate=1.0): [],
        _Treatment("adamw", decay=0.0, rate=1.0): [],
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            lazy = train.lazy_expert_rows and name.endswith(EXPERT_TABLES)
            way = "lazy" if lazy else "muon" if name in matrices else "adamw"
            members.setdefault(_Treatment(way, decays[name], rates[name]), []).append(parameter)
    return [_group(treatment, params, train) for treatment, params in members.items()]


def _group(treatment: _Treatment, params: list[nn.Parameter], train: TrainSettings) -> dict[str, Any]:
    way, decay, rate = treatment
    peak = train.muon_learning_rate if way == "muon" else train.learning_rate
    group = {"params": params, "lr": peak * rate, "weight_decay": train.weight_decay * decay}
    if way == "muon":
        group |= {"muon": True, "momentum": train.muon_momentum}
    elif way == "lazy":
        group["lazy_rows"] = True
    return group

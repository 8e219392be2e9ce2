"""Settings of a run: nested dataclasses ↔ YAML ↔ `--set key=value`, strict about every key and every value.

A settings file of pre-training has two parts. `model:` holds the fields of `DogeConfig` that shape the model; `train:`
holds the published training keys and a few more. Fine-tuning starts from a model that there is, so it has `train:` and
`lora:` (and `dpo:`). A key that is not a field of the dataclasses below is an error that names the nearest one that is,
and a value of the wrong kind says what would do: nothing in a file is silently ignored.
"""

import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml

from doge_lm.errors import UserError
from doge_lm.model.configuration_doge import DogeConfig
from doge_lm.training.presets import preset_paths

Auto = Literal["auto"]

_Settings = TypeVar("_Settings", bound="RunSettings")


@dataclass
class ModelSettings:
    """The `model:` part: fields of `DogeConfig`, which documents them and checks that they fit together.

    The published presets give all the sizes; a size that is left out is Doge-25M's.
    """

    vocab_size: int = 32768
    hidden_size: int = 256
    num_hidden_layers: int = 8
    hidden_bias: bool = False
    hidden_dropout: float = 0.0
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 16384
    rope_theta: float = 10000.0
    rope_parameters: dict | None = None
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    tie_word_embeddings: bool = False
    embedding_multiplier: float = 1.0
    final_logit_softcapping: float | None = None
    num_attention_heads: int = 2
    num_inner_values: int = 2
    inner_values_retrieval_size: int = 128
    inner_value_init: str = DogeConfig.inner_value_init
    qk_norm: bool = False
    key_shift: bool = False
    attention_shift: bool = False
    feed_forward_shift: bool = False
    value_residual: bool = False
    dense_skips: bool = False
    cross_domain_intermediate_size: int = 1024
    shared_gate: bool = False
    parallel_experts: bool = False
    private_expert_intermediate_size: int = 256
    num_cdmmoe_experts: int = 256
    num_cdmmoe_heads: int = 1
    num_cdmmoe_experts_per_head: int = 2
    router_queries: bool = True
    cdmoe_path: str = "auto"
    weight_init: str = DogeConfig.weight_init
    initializer_range: float = 0.02


@dataclass
class TrainSettings:
    """The `train:` part. Every preset comments every key; "step" always means a step of the optimizer."""

    LEFT_OUT: ClassVar[frozenset[str]] = frozenset()
    """Fields that are no keys of this kind of run."""
    ROWS: ClassVar[int] = 1
    """Rows that the model reads for what is counted as a sequence."""

    # Data and length of the run
    dataset_path: str = "./datasets/pretrain"
    stream: str | None = None
    stream_workers: int = 2
    stream_test_rows: int = 256
    stream_on_error: Literal["stop", "skip"] = "stop"
    sequence_length: int = 2048
    sequences_per_step: int | Auto = "auto"
    per_device_train_batch_size: int | Auto = "auto"
    accumulate_steps: int | Auto = "auto"
    per_epoch_max_steps: int | None = 4000
    num_train_epochs: int = 2
    document_mask: bool = True
    seed: int = 233
    # Optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 8e-4
    muon_learning_rate: float = 0.02
    learning_rate_scales: dict[str, float] | None = None
    lr_scheduler_type: Literal["cosine", "constant"] = "cosine"
    warmup_ratio: float = 0.1
    min_lr_rate: float = 0.1
    weight_decay: float = 0.01
    weight_decay_scales: dict[str, float] | None = None
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    muon_momentum: float = 0.95
    max_grad_norm: float = 1.0
    lazy_expert_rows: bool = False
    # How it is computed
    bf16: bool | Auto = True
    torch_compile: bool | Auto = "auto"
    cuda_graphs: bool | Auto = "auto"
    attn_implementation: Literal["sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3"] = "sdpa"
    gradient_checkpointing: bool = False
    recompute_activation: bool = False
    dataloader_num_workers: int = 0
    # What is reported and kept
    logging_steps: int = 10
    eval_steps: int = 500
    per_device_eval_batch_size: int = 8
    save_steps: int = 500
    save_total_limit: int | None = 3


@dataclass
class TuneSettings(TrainSettings):
    """The `train:` part of fine-tuning: as of pre-training, without a stream, and with values that fit."""

    LEFT_OUT: ClassVar[frozenset[str]] = frozenset({"stream", "stream_workers", "stream_test_rows", "stream_on_error"})

    dataset_path: str = "./datasets/finetune"
    sequences_per_step: int | Auto = 16
    per_epoch_max_steps: int | None = None
    num_train_epochs: int = 2
    learning_rate: float = 2e-4
    muon_learning_rate: float = 5e-3
    weight_decay: float = 0.0
    adam_beta2: float = 0.95
    eval_steps: int = 100


@dataclass
class PairSettings(TuneSettings):
    """The `train:` part of preference tuning: a "sequence" is a pair of answers."""

    LEFT_OUT: ClassVar[frozenset[str]] = TuneSettings.LEFT_OUT | {"document_mask", "torch_compile", "cuda_graphs"}
    ROWS: ClassVar[int] = 2

    dataset_path: str = "./datasets/preferences"
    sequence_length: int = 1024
    torch_compile: bool | Auto = False
    num_train_epochs: int = 1
    learning_rate: float = 2e-5
    muon_learning_rate: float = 5e-4
    document_mask: bool = False
    cuda_graphs: bool | Auto = False


# The linear maps of a layer, and the tables of its experts.
LORA_TARGETS = (
    "q_proj",
    "k_proj",
    "o_proj",
    "v_queries",
    "shared_gate_proj",
    "shared_up_proj",
    "shared_down_proj",
    "queries",
    "down_embed",
    "up_embed",
)


@dataclass
class LoraSettings:
    """The `lora:` part: train low-rank changes of some matrices in place of all weights (arXiv 2106.09685)."""

    rank: int = 0
    alpha: int = 32
    dropout: float = 0.0
    targets: str = " ".join(LORA_TARGETS)

    @property
    def names(self) -> list[str]:
        """The modules that are changed."""
        return self.targets.replace(",", " ").split()


@dataclass
class DpoSettings:
    """The `dpo:` part: direct preference optimization (arXiv 2305.18290)."""

    beta: float = 0.1
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust", "apo_zero", "sigmoid_norm"] = "sigmoid"
    label_smoothing: float = 0.0
    test_share: float = 0.05


Check = tuple[Callable[[Any], bool], str]


def _at_least(low: int) -> Check:
    return (lambda value: value >= low), f"at least {low}"


def _factors(fits: Callable[[float], bool], text: str) -> Check:
    return (
        (lambda scales: all(part and fits(factor) for part, factor in scales.items())),
        f"factors {text} by parts of names",
    )


_POSITIVE: Check = ((lambda value: value > 0), "above 0")
_NOT_NEGATIVE: Check = ((lambda value: value >= 0), "0 or more")
_SHARE: Check = ((lambda value: 0 <= value <= 1), "between 0 and 1")
_BELOW_ONE: Check = ((lambda value: 0 <= value < 1), "0 or more and below 1")

# Ranges of the `train:` values; `DogeConfig` checks those of `model:`. The text completes "it must be …".
_RANGES: dict[str, Check] = {
    "stream_workers": _at_least(1),
    "stream_test_rows": _at_least(1),
    "sequence_length": _at_least(2),
    "sequences_per_step": _at_least(1),
    "per_device_train_batch_size": _at_least(1),
    "accumulate_steps": _at_least(1),
    "per_epoch_max_steps": _at_least(1),
    "num_train_epochs": _at_least(1),
    "seed": ((lambda value: 0 <= value < 2**32), "0 or more and below 2**32"),
    "learning_rate": _POSITIVE,
    "muon_learning_rate": _POSITIVE,
    "learning_rate_scales": _factors((lambda factor: factor > 0), "above 0"),
    "warmup_ratio": _BELOW_ONE,
    "min_lr_rate": _SHARE,
    "weight_decay": _NOT_NEGATIVE,
    "weight_decay_scales": _factors((lambda factor: factor >= 0), "of 0 or more"),
    "adam_beta1": _BELOW_ONE,
    "adam_beta2": _BELOW_ONE,
    "adam_epsilon": _POSITIVE,
    "muon_momentum": _BELOW_ONE,
    "max_grad_norm": _NOT_NEGATIVE,
    "dataloader_num_workers": _at_least(0),
    "logging_steps": _at_least(1),
    "eval_steps": _at_least(1),
    "per_device_eval_batch_size": _at_least(1),
    "save_steps": _at_least(1),
    "save_total_limit": _at_least(1),
    "rank": _at_least(0),
    "alpha": _POSITIVE,
    "dropout": _BELOW_ONE,
    "beta": _POSITIVE,
    "label_smoothing": ((lambda value: 0 <= value < 0.5), "0 or more and below 0.5"),
    "test_share": ((lambda value: 0 < value < 1), "above 0 and below 1"),
    "targets": (
        (lambda value: bool(value.split()) and set(value.replace(",", " ").split()) <= set(LORA_TARGETS)),
        f"some of: {' '.join(LORA_TARGETS)}",
    ),
}


@dataclass
class RunSettings:
    """All settings of a run, its parts; `origin` is where they came from (for error messages)."""

    origin: str = field(default="the defaults", kw_only=True)

    @classmethod
    def parts(cls) -> list[str]:
        """The names of the parts."""
        return [each.name for each in fields(cls) if each.name != "origin"]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The parts as plain values, every key present."""
        return {part: {key: getattr(getattr(self, part), key) for key in self.names(part)} for part in self.parts()}

    def to_yaml(self) -> str:
        """The text of a settings file that `load_settings` reads back to the same settings."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def names(self, part: str) -> list[str]:
        """The keys of a part."""
        values = getattr(self, part)
        return [each.name for each in fields(values) if each.name not in getattr(values, "LEFT_OUT", ())]


@dataclass
class Settings(RunSettings):
    """All settings of pre-training."""

    model: ModelSettings = field(default_factory=ModelSettings)
    train: TrainSettings = field(default_factory=TrainSettings)

    def model_config(self) -> DogeConfig:
        """The configuration of the model.

        Raises:
            UserError: if the sizes do not fit together; the message names the field and a value that would do.
        """
        try:
            return DogeConfig(**asdict(self.model))
        except ValueError as error:
            raise UserError(f"{self.origin}: model: {error}") from error


@dataclass
class FinetuneSettings(RunSettings):
    """All settings of fine-tuning."""

    train: TuneSettings = field(default_factory=TuneSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)


@dataclass
class PreferenceSettings(RunSettings):
    """All settings of preference tuning."""

    train: PairSettings = field(default_factory=PairSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    dpo: DpoSettings = field(default_factory=DpoSettings)


def load_settings(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Read a settings file of pre-training; see `load_settings_of`."""
    return load_settings_of(Settings, path_or_name, overrides)


def load_settings_of(
    kind: type[_Settings], path_or_name: str | Path, overrides: Sequence[str] = (), folder: str = ""
) -> _Settings:
    """Read a settings file, given by path or as the bare name of a preset, and apply `--set key=value` overrides.

    Args:
        kind: the class of the settings.
        path_or_name: a path, or a name among the presets of `folder`.
        overrides: each `key=value`.
        folder: of the presets, within that of pre-training's.

    Raises:
        UserError: for a missing or malformed file, an unknown or repeated key, and a value that does not fit.
    """
    path = find_preset(path_or_name, folder)
    settings = parse_settings_of(kind, _read_yaml(path), str(path))
    for override in overrides:
        apply_override(settings, override)
    if overrides:
        settings.origin += f" with {' '.join(f'--set {override}' for override in overrides)}"
    return settings


def parse_settings(document: Any, origin: str) -> Settings:
    """Turn the parsed content of a settings file of pre-training into `Settings`; see `parse_settings_of`."""
    return parse_settings_of(Settings, document, origin)


def parse_settings_of(kind: type[_Settings], document: Any, origin: str) -> _Settings:
    """Turn the parsed content of a settings file into settings; `origin` is the name used in error messages."""
    parts = kind.parts()
    if not isinstance(document, dict):
        raise UserError(f"{origin}: expected the parts {', '.join(f'`{part}:`' for part in parts)} at the top level")
    settings = kind(origin=origin)
    for part, values in document.items():
        if part not in parts:
            raise UserError(f"{origin}: unknown part {part!r}; {_nearest(part, parts)}")
        if values is None:
            continue
        if not isinstance(values, dict):
            raise UserError(f"{origin}: {part}: expected `key: value` lines, found {values!r}")
        for key, value in values.items():
            _assign(settings, part, key, value, f"{origin}: {part}.{key}")
    return settings


def apply_override(settings: RunSettings, override: str) -> None:
    """Apply one `key=value`, where key is `train.learning_rate`, or `learning_rate` as no part shares a name.

    `learning_rate_scales.word_embed=3` changes one entry of a mapping and keeps the others.

    Raises:
        UserError: naming the flag, the key and the nearest known one.
    """
    key, equals, text = override.partition("=")
    key = key.strip()
    where = f"--set {override}"
    if not equals or not key:
        raise UserError(f"{where}: expected key=value, for example --set learning_rate=3e-4")
    key, entry = _split_entry(settings, key)
    part, dot, name = key.rpartition(".")
    known = settings.parts()
    if dot and part not in known:
        raise UserError(f"{where}: unknown part {part!r}; {_nearest(part, known)}")
    parts = [part] if dot else [each for each in known if name in settings.names(each)]
    if not parts:
        keys = [key for each in known for key in settings.names(each)]
        raise UserError(f"{where}: unknown key {name!r}; {_nearest(name, keys)}")
    if len(parts) > 1:
        raise UserError(f"{where}: {name} is a key of both parts; write {' or '.join(f'{p}.{name}' for p in parts)}")
    value = _parse_yaml(text, f"{where}: {text!r} is not a YAML value")
    if entry:
        value = {**(getattr(getattr(settings, parts[0]), name) or {}), entry: value}
    _assign(settings, parts[0], name, value, where)


def _split_entry(settings: RunSettings, key: str) -> tuple[str, str]:
    """A key and what stands behind it where it names an entry of a mapping, else "": of `train.a.b.c`, `b.c`."""
    for part in settings.parts():
        kinds = typing.get_type_hints(type(getattr(settings, part)))
        for name in settings.names(part):
            if any(dict in (option, typing.get_origin(option)) for option in typing.get_args(kinds[name])):
                for start in (name, f"{part}.{name}"):
                    if key.startswith(f"{start}."):
                        return start, key.removeprefix(f"{start}.")
    return key, ""


def find_preset(path_or_name: str | Path, folder: str = "") -> Path:
    """The settings file of that path, or else the preset of that bare name (`doge_25M` or `doge_25M.yaml`).

    Presets (of `folder`: "finetune", "dpo"; those of pre-training by default) are looked for in the checkout
    (`model/config`) or, for an installed package, inside the package.

    Raises:
        UserError: if there is neither; the message lists the presets.
    """
    path = Path(path_or_name)
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{path} is a directory; --config_path wants a .yaml file or the name of a preset")
    presets = preset_paths(folder)
    wanted = str(path_or_name).removesuffix(".yaml")
    if wanted in presets:
        return presets[wanted]
    raise UserError(
        f"{path_or_name}: no such file, and no preset of that name; {_nearest(wanted, presets)} "
        f"(presets: {', '.join(presets)})"
    )


class _PlainLoader(yaml.SafeLoader):
    """YAML that is a tree of values under plain keys, each given once.

    PyYAML quietly keeps the last of equal keys, fails on keys that are lists, and builds values that contain
    themselves where an alias (`*name`) stands inside its own anchor (`&name`). Settings have no use for aliases.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            problem = f"the alias *{alias.anchor} is not supported; write the value out"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=alias.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, list | dict | set):
                problem = f"{key!r} cannot be a key; a key is a name"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error}") from error
    return _parse_yaml(text, str(path))


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: {_one_line(error)}") from error
    except RecursionError:
        raise UserError(f"{where}: values are nested too deeply") from None
    except (ValueError, LookupError, AttributeError) as error:
        # PyYAML fails so on values that only look like their kind, such as the date 2024-13-45 or `!!bool maybe`.
        raise UserError(f"{where}: a value cannot be read ({error})") from error


def _one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).replace("\n", " ")
    return f"line {mark.line + 1}: {problem}" if mark is not None else str(problem)


def _nearest(word: object, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.0)
    return f"the nearest known one is {close[0]!r}" if close else "nothing is known here"


def _assign(settings: RunSettings, part: str, key: Any, value: Any, where: str) -> None:
    names = settings.names(part)
    if key not in names:
        raise UserError(f"{where}: unknown key {key!r}; {_nearest(key, names)}")
    kind = typing.get_type_hints(type(getattr(settings, part)))[key]
    try:
        converted = _convert(value, kind)
    except ValueError:
        raise UserError(f"{where}: {value!r} does not fit; {key} must be {_describe(kind)}") from None
    fits, needs = _RANGES.get(key, (lambda _: True, ""))
    if converted is not None and converted != "auto" and not fits(converted):
        raise UserError(f"{where}: {value!r} does not fit; {key} must be {needs}")
    setattr(getattr(settings, part), key, converted)


def _convert(value: Any, kind: Any) -> Any:
    """`value` as a `kind` (bool, int, float, str, dict, None, a Literal, or a union of these); ValueError if not.

    A dict may say of what: `dict[str, float]`.
    """
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        for option in typing.get_args(kind):
            try:
                return _convert(value, option)
            except ValueError:
                continue
        raise ValueError(value)
    if typing.get_origin(kind) is Literal:
        if value in typing.get_args(kind):
            return value
        raise ValueError(value)
    if typing.get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise ValueError(value)
        of_key, of_value = typing.get_args(kind)
        return {_convert(key, of_key): _convert(each, of_value) for key, each in value.items()}
    if kind is types.NoneType:
        if value is None:
            return None
        raise ValueError(value)
    if kind is float:
        return _to_float(value)
    # bool is a subclass of int in Python, but `true` is no number to a reader of the file.
    if isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
        return value
    raise ValueError(value)


def _to_float(value: Any) -> float:
    # YAML 1.1 reads 8e-4, without a dot, as text.
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(value)
    try:
        number = float(value)
    except OverflowError as error:
        raise ValueError(value) from error
    if not math.isfinite(number):
        raise ValueError(value)
    return number


_DESCRIPTIONS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    dict[str, float]: "a mapping of text to numbers",
    types.NoneType: "null",
}


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return " or ".join(_describe(option) for option in typing.get_args(kind))
    if typing.get_origin(kind) is Literal:
        return " or ".join(str(option) for option in typing.get_args(kind))
    return _DESCRIPTIONS[kind]

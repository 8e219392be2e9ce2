"""Configuration of the Doge model (arXiv 2407.16958)."""

from math import isqrt
from typing import Any

from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

from .cdmoe import PATHS, key_table_sizes

INNER_VALUE_INITS = ("identity", "normal")
WEIGHT_INITS = ("normal", "fan_in")

_POSITIVE_INTEGERS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "max_position_embeddings",
    "num_attention_heads",
    "num_inner_values",
    "inner_values_retrieval_size",
    "cross_domain_intermediate_size",
    "private_expert_intermediate_size",
    "num_cdmmoe_experts",
    "num_cdmmoe_heads",
    "num_cdmmoe_experts_per_head",
)


class DogeConfig(PreTrainedConfig):
    r"""The sizes and options of a [`DogeModel`]. The defaults are those of Doge-25M.

    Args:
        vocab_size: number of token ids.
        hidden_size: d, the width of the residual stream.
        num_hidden_layers: number of decoder layers.
        hidden_bias: whether the linear maps of attention and feed-forward have a bias.
        hidden_dropout: dropout probability on both branches of a layer.
        hidden_act: name of the activation σ in the CDMoE, one of `transformers.activations.ACT2FN`.
        rms_norm_eps: ε of every RMSNorm.
        max_position_embeddings: the longest sequence the model is meant for, in tokens.
        rope_theta: base of the rotary angles; it is moved into `rope_parameters`.
        rope_parameters: rotary embedding with any of transformers' scaling types,
            e.g. `{"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}`.
        use_cache: whether the model returns keys and values by default.
        pad_token_id, bos_token_id, eos_token_id: special tokens.
        tie_word_embeddings: whether `lm_head` shares the weight of `word_embed`.
        num_attention_heads: h; the size of a head, d / h, must be even.
        num_inner_values: n, the rows of E that the inner function chooses from.
        inner_values_retrieval_size: r, the width in which the inner value is chosen.
        inner_value_init: where E starts: `"identity"`, 1 + N(0, 0.02), so that the value is nearly the input
            itself, or `"normal"`, N(0, 0.02), as published.
        cross_domain_intermediate_size: hidden width of the part of the CDMoE that all domains share.
        private_expert_intermediate_size: e, the width in which experts are chosen and read; even.
        num_cdmmoe_experts: N, the number of experts of a layer. It is factored into n1·n2, as near square as it
            goes, and must have a factor other than 1 and itself.
        num_cdmmoe_heads: H, the number of independent retrievals for each token.
        num_cdmmoe_experts_per_head: k, the number of experts that one retrieval takes.
        cdmoe_path: how experts are computed, `"auto"` (by size), `"gather"` or `"dense"`; the result is the same.
        weight_init: `"normal"`, every matrix N(0, `initializer_range`), as published; or `"fan_in"`, matrices
            N(0, 1/√fan_in). The token embedding is N(0, `initializer_range`) in both.
        initializer_range: see `weight_init`.

    Raises:
        ValueError: for sizes that do not fit together; the message names the field and a value that would do.
    """

    model_type = "doge_ifa"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 32768
    hidden_size: int = 256
    num_hidden_layers: int = 8
    hidden_bias: bool = False
    hidden_dropout: float = 0.0
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 16384
    rope_theta: float = 10000.0
    rope_parameters: dict[str, Any] | None = None
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    num_attention_heads: int = 2
    num_inner_values: int = 2
    inner_values_retrieval_size: int = 128
    inner_value_init: str = "identity"
    cross_domain_intermediate_size: int = 1024
    private_expert_intermediate_size: int = 256
    num_cdmmoe_experts: int = 256
    num_cdmmoe_heads: int = 1
    num_cdmmoe_experts_per_head: int = 2
    cdmoe_path: str = "auto"
    weight_init: str = "normal"
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        self._validate_sizes()
        self._validate_choices()
        self._validate_tokens()
        super().__post_init__(**kwargs)
        self._settle_rope_theta()

    def _validate_sizes(self) -> None:
        for name in _POSITIVE_INTEGERS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                default = getattr(type(self), name)
                raise ValueError(f"{name} is {value!r}; it must be a whole number above 0, e.g. {default}")
        self._validate_heads()
        self._validate_experts()
        if not 0.0 <= self.hidden_dropout < 1.0:
            raise ValueError(f"hidden_dropout is {self.hidden_dropout!r}; it must lie in [0, 1), e.g. 0.0")
        if not self.initializer_range > 0.0:
            raise ValueError(f"initializer_range is {self.initializer_range!r}; it must be above 0, e.g. 0.02")
        if not self.rms_norm_eps > 0.0:
            raise ValueError(f"rms_norm_eps is {self.rms_norm_eps!r}; it must be above 0, e.g. 1e-6")

    def _validate_heads(self) -> None:
        d, h = self.hidden_size, self.num_attention_heads
        fitting = [count for count in range(1, d + 1) if d % (2 * count) == 0]
        if h in fitting:
            return
        what = (
            f"does not divide hidden_size {d}"
            if d % h
            else f"gives heads of {d // h} features, and rotary embedding needs an even number"
        )
        if not fitting:
            raise ValueError(f"hidden_size is {d}; it must be even, e.g. {d + 1}")
        nearest = min(fitting, key=lambda count: abs(count - h))
        raise ValueError(f"num_attention_heads {h} {what}; {nearest} would do")

    def _validate_experts(self) -> None:
        e, count, k = (
            self.private_expert_intermediate_size,
            self.num_cdmmoe_experts,
            self.num_cdmmoe_experts_per_head,
        )
        if e % 2:
            raise ValueError(
                f"private_expert_intermediate_size is {e}; a query is cut into two halves, so it must be even, "
                f"e.g. {e + 1}"
            )
        if key_table_sizes(count)[0] == 1:
            raise ValueError(
                f"num_cdmmoe_experts {count} has no factorization into two key tables; "
                f"{_nearest_product(count)} would do"
            )
        if k > count:
            raise ValueError(
                f"num_cdmmoe_experts_per_head {k} is more than num_cdmmoe_experts {count}; {count} or less would do"
            )

    def _validate_choices(self) -> None:
        choices = {
            "inner_value_init": INNER_VALUE_INITS,
            "weight_init": WEIGHT_INITS,
            "cdmoe_path": PATHS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        if self.hidden_act not in ACT2FN:
            raise ValueError(
                f"hidden_act {self.hidden_act!r} is no activation of transformers; silu, gelu or relu would do"
            )

    def _validate_tokens(self) -> None:
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            for token in value if isinstance(value, list) else [value]:
                if token is not None and not 0 <= token < self.vocab_size:
                    raise ValueError(
                        f"{name} {token} lies outside the vocabulary; it must be below vocab_size {self.vocab_size}"
                    )

    def _settle_rope_theta(self) -> None:
        """Keep the field `rope_theta` equal to what the rotary embedding uses."""
        used = (self.rope_parameters or {}).get("rope_theta", self.rope_theta)
        default = type(self).rope_theta
        if self.rope_theta not in (used, default):
            raise ValueError(
                f"rope_theta is {self.rope_theta} and rope_parameters['rope_theta'] is {used}; give one of the two"
            )
        self.rope_theta = used


def _nearest_product(count: int) -> int:
    """The number nearest to `count` whose two key tables differ in size by at most a factor of 2."""
    for distance in range(count + 4):
        for candidate in (count + distance, count - distance):
            if candidate >= 4 and _near_square(candidate):
                return candidate
    raise AssertionError("every square of at least 4 qualifies")


def _near_square(count: int) -> bool:
    n1, n2 = key_table_sizes(count)
    return n1 > 1 and n2 <= 2 * n1 and isqrt(count) >= n1


__all__ = ["DogeConfig"]

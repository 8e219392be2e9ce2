"""Configuration of the Doge model (arXiv 2407.16958)."""

from difflib import get_close_matches
from math import isfinite, isqrt
from typing import Any

from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .cdmoe import PATHS, key_table_sizes

INNER_VALUE_INITS = ("identity", "normal")
WEIGHT_INITS = ("normal", "fan_in")

_SWITCHES = (
    *("hidden_bias", "qk_norm", "key_shift", "attention_shift", "feed_forward_shift", "value_residual"),
    *("dense_skips", "shared_gate", "parallel_experts", "router_queries"),
)
_SIZES = (
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

# Beyond it the product of two sizes, in bytes, is more than a tensor can have.
_LARGEST_SIZE = 2**24

# Field: (lowest value, whether the lowest is allowed, first value that is too high).
_NUMBERS = {
    "hidden_dropout": (0.0, True, 1.0),
    "rms_norm_eps": (0.0, False, 1.0),
    "embedding_multiplier": (0.0, False, float("inf")),
    "final_logit_softcapping": (1e-3, True, 1e6),
    "initializer_range": (0.0, False, float("inf")),
    "rope_theta": (0.0, False, float("inf")),
}

# What the scaling types of transformers read; which of them a type needs, it says itself.
_ROPE_KEYS = (
    *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor"),
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "short_factor", "long_factor"),
    *("low_freq_factor", "high_freq_factor"),
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
        embedding_multiplier: what the rows of `word_embed` are multiplied by on their way into the model, e.g. √d. A
            table that is the head's too can then start as small as a head must.
        final_logit_softcapping: c, what bounds the logits: they are c · tanh(logits / c), in float32 or better, as in
            Gemma 2 (arXiv 2408.00118, section 2); None for no bound.
        num_attention_heads: h; the size of a head, d / h, must be even.
        num_inner_values: n, the rows of E that the inner function chooses from.
        inner_values_retrieval_size: r, the width in which the inner value is chosen.
        inner_value_init: where E starts: `"identity"`, 1 + N(0, 0.02), so that the value is nearly the input
            itself, or `"normal"`, N(0, 0.02), as published.
        qk_norm: whether each head's queries and keys have an RMSNorm before they are rotated.
        key_shift: whether keys are mixed with those of the token before, by learned shares of each feature.
        attention_shift: whether the input of attention is.
        feed_forward_shift: whether the input of the feed-forward is.
        value_residual: whether values are made of what attention reads in the first layer too, by learned gains of
            each feature.
        dense_skips: whether the embedding and the outputs of all earlier layers are added to the input of a layer, by
            learned gains of each feature.
        cross_domain_intermediate_size: hidden width of the part of the CDMoE that all domains share.
        shared_gate: whether that part is gated (SwiGLU), by a third matrix.
        parallel_experts: whether the experts are beside the shared part, both of them reading the layer's input and
            both adding to its output, or behind it, as published. Needs `private_expert_intermediate_size` equal to
            `hidden_size`.
        private_expert_intermediate_size: e, the width in which experts are chosen and read; even.
        num_cdmmoe_experts: N, the number of experts of a layer. It is factored into n1·n2, as near square as it
            goes, and must have a factor other than 1 and itself. 0: no experts, and the shared part is the whole
            feed-forward, an MLP.
        num_cdmmoe_heads: H, the number of independent retrievals for each token.
        num_cdmmoe_experts_per_head: k, the number of experts that one retrieval takes.
        router_queries: whether keys meet a query, cut in two halves, as published; or else the router's input itself.
        cdmoe_path: how experts are computed, `"auto"` (by size), `"gather"`, `"dense"` or `"sparse"` (Triton, on a
            GPU); the result is the same.
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
    embedding_multiplier: float = 1.0
    final_logit_softcapping: float | None = None
    num_attention_heads: int = 2
    num_inner_values: int = 2
    inner_values_retrieval_size: int = 128
    inner_value_init: str = "identity"
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
    weight_init: str = "normal"
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        for derived in ("layer_types", "number_of_conv_states"):
            kwargs.pop(derived, None)
        self._validate_sizes()
        self._validate_choices()
        self._validate_tokens()
        self._validate_rope_keys()
        super().__post_init__(**kwargs)
        self._settle_rope_theta()
        self._validate_rope()

    @property
    def shifts(self) -> list[str]:
        """What is shifted, in the order in which a cache keeps the newest inputs."""
        return [name for name in ("key", "attention", "feed_forward") if getattr(self, f"{name}_shift")]

    @property
    def number_of_conv_states(self) -> int:
        """How many inputs of its newest token a layer keeps in a cache, one for each shift (transformers' name)."""
        return len(self.shifts)

    @property
    def layer_types(self) -> list[str]:
        """What transformers' caches keep for each layer: with a shift the newest inputs beside keys and values.

        Raises:
            AttributeError: without shifts; transformers looks whether there is such an attribute.
        """
        if not self.number_of_conv_states:
            raise AttributeError("layer_types: without shifts all layers are full attention")
        return ["hybrid"] * self.num_hidden_layers

    def _validate_sizes(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            least = 0 if name == "num_cdmmoe_experts" else 1
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _LARGEST_SIZE:
                default = getattr(type(self), name)
                raise ValueError(
                    f"{name} is {value!r}; it must be a whole number from {least} to {_LARGEST_SIZE}, e.g. {default}"
                )
        self._validate_heads()
        self._validate_experts()
        for name, (low, inclusive, high) in _NUMBERS.items():
            value, default = getattr(self, name), getattr(type(self), name)
            if value is None and default is None:
                continue
            if not (_is_finite(value) and low <= value < high and (inclusive or value > low)):
                bounds = f"at least {low:g}" if inclusive else f"above {low:g}"
                bounds += f" and below {high:g}" if isfinite(high) else ""
                no_number, example = ("", default) if default is not None else ("None or ", 30.0)
                raise ValueError(f"{name} is {value!r}; it must be {no_number}a number {bounds}, e.g. {example}")

    def _validate_heads(self) -> None:
        d, h = self.hidden_size, self.num_attention_heads
        if d % (2 * h) == 0:
            return
        what = (
            f"does not divide hidden_size {d}"
            if d % h
            else f"gives heads of {d // h} features, and rotary embedding needs an even number"
        )
        if d % 2:
            raise ValueError(f"hidden_size is {d}; it must be even, e.g. {d + 1}")
        nearest = min(_divisors(d // 2), key=lambda count: abs(count - h))
        raise ValueError(f"num_attention_heads {h} {what}; {nearest} would do")

    def _validate_experts(self) -> None:
        e, count, k = (
            self.private_expert_intermediate_size,
            self.num_cdmmoe_experts,
            self.num_cdmmoe_experts_per_head,
        )
        if (self.parallel_experts or not count) and e != self.hidden_size:
            why = "with parallel_experts the experts read the layer's input"
            if not count:
                why = "without experts (num_cdmmoe_experts is 0) the shared part gives the layer's output"
            raise ValueError(
                f"private_expert_intermediate_size is {e}; {why}, so it must equal hidden_size, {self.hidden_size}"
            )
        if e % 2:
            raise ValueError(
                f"private_expert_intermediate_size is {e}; a query is cut into two halves, so it must be even, "
                f"e.g. {e + 1}"
            )
        if not count:
            return
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
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be true or false")
        if self.hidden_act not in ACT2FN:
            raise ValueError(
                f"hidden_act {self.hidden_act!r} is no activation of transformers; silu, gelu or relu would do"
            )

    def _validate_tokens(self) -> None:
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            for token in value if isinstance(value, list) else [value]:
                if token is not None and not (isinstance(token, int) and 0 <= token < self.vocab_size):
                    raise ValueError(
                        f"{name} {token!r} is no token; it must be a whole number below vocab_size {self.vocab_size}"
                    )

    def _validate_rope_keys(self) -> None:
        given = self.rope_parameters
        if given is None:
            return
        if not isinstance(given, dict):
            raise ValueError(f"rope_parameters is {given!r}; it must be a mapping, e.g. {{'rope_type': 'default'}}")
        for key in given:
            if key not in _ROPE_KEYS:
                nearest = get_close_matches(str(key), _ROPE_KEYS, n=1, cutoff=0.0)[0]
                raise ValueError(f"rope_parameters has the unknown key {key!r}; the nearest known one is {nearest}")
        kinds = ("default", *ROPE_INIT_FUNCTIONS)
        kind = given.get("rope_type", given.get("type", "default"))
        if kind not in kinds:
            raise ValueError(f"rope_parameters['rope_type'] is {kind!r}; it must be one of {', '.join(kinds)}")

    def _validate_rope(self) -> None:
        """Let transformers compute the frequencies once: it says what a scaling type lacks only then."""
        kind = (self.rope_parameters or {}).get("rope_type", "default")
        if kind == "default":
            return
        try:
            frequencies, _ = ROPE_INIT_FUNCTIONS[kind](self)
        except KeyError as error:
            raise ValueError(f"rope_parameters lacks {error.args[0]!r}, which rope_type {kind!r} needs") from error
        except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
            raise ValueError(f"rope_parameters does not fit rope_type {kind!r}: {error}") from error
        self._validate_rope_factors()
        if not bool(frequencies.isfinite().all()):
            raise ValueError(f"rope_parameters of rope_type {kind!r} give frequencies that are not finite")

    def _validate_rope_factors(self) -> None:
        pairs = self.hidden_size // self.num_attention_heads // 2
        for key in ("short_factor", "long_factor"):
            factors = (self.rope_parameters or {}).get(key)
            if factors is not None and len(factors) != pairs:
                raise ValueError(f"rope_parameters[{key!r}] has {len(factors)} factors; a head needs {pairs}")

    def _settle_rope_theta(self) -> None:
        """Keep the field `rope_theta` equal to what the rotary embedding uses."""
        used = (self.rope_parameters or {}).get("rope_theta", self.rope_theta)
        default = type(self).rope_theta
        if self.rope_theta not in (used, default):
            raise ValueError(
                f"rope_theta is {self.rope_theta} and rope_parameters['rope_theta'] is {used}; give one of the two"
            )
        self.rope_theta = used


def _is_finite(value: object) -> bool:
    """Whether it is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def _divisors(number: int) -> list[int]:
    low = [candidate for candidate in range(1, isqrt(number) + 1) if number % candidate == 0]
    return low + [number // candidate for candidate in low]


def _nearest_product(count: int) -> int:
    """The number nearest to `count` whose two key tables differ in size by at most a factor of 2."""
    for distance in range(count + 4):
        for candidate in (count + distance, count - distance):
            if candidate >= 4 and _near_square(candidate):
                return candidate
    raise AssertionError("every square of at least 4 qualifies")


def _near_square(count: int) -> bool:
    n1, n2 = key_table_sizes(count)
    return n1 > 1 and n2 <= 2 * n1


__all__ = ["DogeConfig"]

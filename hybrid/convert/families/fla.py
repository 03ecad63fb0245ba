"""Rules shared by the families of flash-linear-attention, version 0.6.

All stacks have the same form: RMSNorm, a mixer, RMSNorm, a gated feed-forward. ``attn`` lists the
layers with softmax attention instead of the mixer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybrid.convert import rules as r

THEIRS = f"{r.LAYER}attn."
SOFTMAX = {"S": "softmax_attention", "W": "sliding_window_attention"}

# keys of every config class, with their usual defaults
DEFAULTS: dict[str, Any] = {
    "hidden_size": 2048, "num_hidden_layers": 24, "vocab_size": 32000, "attn": None,
    "hidden_ratio": 4, "intermediate_size": None, "hidden_act": "swish", "norm_eps": 1e-6,
    "max_position_embeddings": 2048, "initializer_range": 0.02, "tie_word_embeddings": False,
    "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2, "fuse_norm": True,
    "fuse_swiglu": True, "fuse_cross_entropy": True, "fuse_linear_cross_entropy": False,
    "use_l2warp": False, "use_cache": True, "attnres_block_size": None, "attn_mode": "chunk",
}  # fmt: skip
RECURRENT_DEFAULTS: dict[str, Any] = {"use_short_conv": True, "conv_size": 4}

# kernels and losses; and keys of older files that the classes do not read
UNREAD = r.ignored(
    "attn_mode", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy",
    "use_l2warp", "share_conv_kernel", "rms_norm_eps",
)  # fmt: skip


def width(path: str, ratio: float, share: float, multiple: int) -> r.ConfigRule:
    """Relate ``intermediate_size``, by default ``hidden_ratio`` * D * ``share``, rounded up to a
    multiple.
    """

    def read(config: Any) -> r.Flat:
        size = config.intermediate_size
        if size is None:
            asked = ratio if config.hidden_ratio is None else config.hidden_ratio
            size = multiple * -(-int(config.hidden_size * asked * share) // multiple)
        return {path: size}

    def write(flat: r.Flat) -> r.Flat:
        return {"intermediate_size": flat[path]} if path in flat else {}

    return r.both("intermediate_size", "hidden_ratio", read=read, write=write)


FEED_FORWARD: tuple[r.ConfigRule, ...] = (
    width("feed_forwards.-.intermediate_size", 4, 2 / 3, 256),
    r.must("hidden_act", "swish"),
    r.always(**{"feed_forwards__-__activation": "swiglu"}),
)
STACK: tuple[r.ConfigRule, ...] = (
    *r.SIZES,
    r.key("norm_eps"),
    *FEED_FORWARD,
    r.must("attnres_block_size", None),
    UNREAD,
)


def _specs(config: Any) -> list[dict[str, Any]]:
    """Return the entries of ``attn``, one for each kind of softmax attention."""
    given = config.attn
    return [] if given is None else [given] if isinstance(given, dict) else list(given)


def _kind(spec: dict[str, Any]) -> str:
    return "S" if spec.get("window_size") is None else "W"


def softmax_options(letter: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Return our options for an entry of ``attn``."""
    theta = spec.get("rope_theta", 10000.0)
    found = {
        "num_heads": spec["num_heads"],
        "num_kv_heads": spec.get("num_kv_heads"),
        "bias": spec.get("qkv_bias", False),
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }
    found |= {"window": spec["window_size"]} if letter == "W" else {}
    return {f"mixers.{letter}.{name}": value for name, value in found.items()}


def softmax_spec(letter: str, flat: r.Flat) -> dict[str, Any]:
    """Return an entry of ``attn`` for our options; the inverse of ``softmax_options``."""
    rope = flat[f"mixers.{letter}.rope_parameters"]
    if rope is None or rope.get("rope_type", "default") != "default":
        raise r.Inexpressible(
            f"mixers.{letter}.rope_parameters: expected default rotary parameters, got {rope!r}"
        )
    return {
        "num_heads": flat[f"mixers.{letter}.num_heads"],
        "num_kv_heads": flat[f"mixers.{letter}.num_kv_heads"],
        "qkv_bias": flat[f"mixers.{letter}.bias"],
        "window_size": flat.get(f"mixers.{letter}.window") if letter == "W" else None,
        "rope_theta": rope.get("rope_theta", 10000.0),
    }


def _read_attn(config: Any) -> r.Flat:
    flat: dict[str, Any] = {}
    for spec in _specs(config):
        found = softmax_options(_kind(spec), spec)
        if any(flat.get(path, value) != value for path, value in found.items()):
            raise r.Inexpressible(
                "attn: expected entries that differ only in their window, got other differences"
            )
        flat |= found
    return flat


def _write_attn(flat: r.Flat) -> r.Flat:
    layers = [letter for letter in flat["letters"] if letter != "c"]
    if all(letter in SOFTMAX for letter in layers):
        raise r.Inexpressible(
            "attn: expected layers without softmax attention, got none; try transformer or llama"
        )
    specs = [
        {"layers": [i for i, found in enumerate(layers) if found == letter]}
        | softmax_spec(letter, flat)
        for letter in SOFTMAX
        if letter in layers
    ]
    return {"attn": None if not specs else specs[0] if len(specs) == 1 else specs}


ATTN: r.ConfigRule = r.both("attn", read=_read_attn, write=_write_attn)


def mixed(letter: str) -> r.LayerRule:
    """Relate the layers: the mixer of the family in every layer that ``attn`` does not list."""

    def read(config: Any) -> Sequence[str]:
        layers = [letter] * config.num_hidden_layers
        for spec in _specs(config):
            for i in spec["layers"]:
                if not 0 <= i < len(layers):
                    raise r.Inexpressible(f"attn: expected layers below {len(layers)}, got {i}")
                layers[i] = _kind(spec)
        return layers

    return r.LayerRule(("attn",), read, lambda layers: {})


def expansion(letter: str, heads: str = "num_heads") -> tuple[r.ConfigRule, ...]:
    """Relate heads, and K and V as fractions of D: ``expand_k`` and ``expand_v``."""

    def read(config: Any) -> r.Flat:
        return {
            f"mixers.{letter}.{ours}": round(config.hidden_size * share) // getattr(config, heads)
            for ours, share in (("head_dim", config.expand_k), ("value_head_dim", config.expand_v))
        }

    def write(flat: r.Flat) -> r.Flat:
        if f"mixers.{letter}.num_heads" not in flat:
            return {}
        count, hidden = flat[f"mixers.{letter}.num_heads"], flat["hidden_size"]
        return {
            theirs: _share(count * flat[f"mixers.{letter}.{ours}"], hidden)
            for theirs, ours in (("expand_k", "head_dim"), ("expand_v", "value_head_dim"))
        }

    return (
        r.key(heads, f"mixers.{letter}.num_heads"),
        r.both("expand_k", "expand_v", read=read, write=write),
    )


def _share(part: int, whole: int) -> float:
    return r.simplest(part / whole, part, lambda share: whole * share)


def grouped_expansion(letter: str) -> tuple[r.ConfigRule, ...]:
    """Relate the heads of q and k, the heads of v (possibly more), and V as a multiple of K."""
    path = f"mixers.{letter}."

    def read(config: Any) -> r.Flat:
        values = config.num_heads if config.num_v_heads is None else config.num_v_heads
        return {
            f"{path}num_heads": values,
            f"{path}num_key_heads": config.num_heads,
            f"{path}head_dim": config.head_dim,
            f"{path}value_head_dim": int(config.head_dim * config.expand_v),
        }

    def write(flat: r.Flat) -> r.Flat:
        if f"{path}num_heads" not in flat:
            return {}
        return {
            "num_heads": flat[f"{path}num_key_heads"],
            "num_v_heads": flat[f"{path}num_heads"],
            "head_dim": flat[f"{path}head_dim"],
            "expand_v": _share(flat[f"{path}value_head_dim"], flat[f"{path}head_dim"]),
        }

    return (r.both("num_heads", "num_v_heads", "head_dim", "expand_v", read=read, write=write),)


def ungrouped() -> r.ConfigRule:
    """Relate ``num_kv_heads``, which must equal ``num_heads``."""

    def read(config: Any) -> r.Flat:
        if config.num_kv_heads not in (None, config.num_heads):
            raise r.Inexpressible(
                f"num_kv_heads: expected num_heads, {config.num_heads}, got {config.num_kv_heads}:"
                " states shared by several query heads are not supported"
            )
        return {}

    return r.both("num_kv_heads", read=read, write=lambda flat: {"num_kv_heads": None})


def short_conv(letter: str) -> r.ConfigRule:
    """Relate ``use_short_conv`` and ``conv_size``."""
    path = f"mixers.{letter}.conv_size"

    def write(flat: r.Flat) -> r.Flat:
        if path not in flat:
            return {}
        size = {} if flat[path] is None else {"conv_size": flat[path]}
        return {"use_short_conv": flat[path] is not None, **size}

    return r.both(
        "use_short_conv",
        "conv_size",
        read=lambda config: {path: config.conv_size if config.use_short_conv else None},
        write=write,
    )


def named_norm(letter: str) -> r.ConfigRule:
    """Relate ``fuse_norm`` in families where the name of a tensor depends on it."""

    def read(config: Any) -> r.Flat:
        if not config.fuse_norm and config.use_output_gate:
            raise r.Inexpressible(
                "fuse_norm: expected True, got False; try True with the tensors attn.g_norm renamed"
                " to attn.g_norm_swish_gate, which computes the same"
            )
        return {f"mixers.{letter}.output_gate": config.use_output_gate}

    return r.both("fuse_norm", read=read, write=lambda flat: {"fuse_norm": True})


def _sizes(options: Any) -> list[int]:
    """Return the number of channels of q, k and v."""
    heads, key_dim, value_dim = options.sizes
    inner_key = (getattr(options, "num_key_heads", None) or heads) * key_dim
    return [inner_key, inner_key, heads * value_dim]


def ends() -> tuple[r.Rule, ...]:
    """Return the rules of embeddings, last norm and head."""
    return (
        r.rule("model.embeddings.weight", "model.embed_tokens.weight"),
        *r.renames("model.", "model.", ["norm"]),
        r.rule("lm_head.weight"),
    )


SOFTMAX_WEIGHTS: tuple[r.Rule, ...] = r.renames(
    THEIRS, r.MIXER, ["q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"], mixer="SW"
)
STACK_WEIGHTS: tuple[r.Rule, ...] = (
    *ends(),
    *r.renames(r.LAYER, r.LAYER, {"attn_norm": "mixer_residual.norm_in"}),
    *r.renames(r.LAYER, r.LAYER, {"mlp_norm": "ffn_residual.norm_in"}),
    *SOFTMAX_WEIGHTS,
    *r.renames(f"{r.LAYER}mlp.", r.FFN, ["gate_proj", "up_proj", "down_proj"], ffn="-"),
)


def mixer_weights(
    letter: str, names: dict[str, str], qkv: Sequence[str] = "qkv"
) -> tuple[r.Rule, ...]:
    """Return the tensor rules common to nearly all mixers.

    Args:
        letter: letter of the mixer.
        names: matrices and norms other than q, k, v and o, their name -> our name.
        qkv: their names of the q, k and v projections.
    """
    inputs = {f"{theirs}_proj": f"{ours}_proj" for theirs, ours in zip(qkv, "qkv", strict=True)}
    return (
        *r.renames(THEIRS, r.MIXER, {**inputs, "o_proj": "o_proj", **names}, mixer=letter),
        r.three_convolutions(THEIRS, letter, r.Fuse(sizes=_sizes), qkv),
    )

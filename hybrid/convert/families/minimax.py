"""MiniMax-01: lightning attention, every eighth layer softmax, experts, residuals of normed inputs."""

from typing import Any

import torch

from hybrid.convert import published
from hybrid.convert import rules as r

THEIRS = f"{r.LAYER}self_attn."
BLOCK = 256


def _read_rotary(config: Any) -> r.Flat:
    """Read ``rotary_dim``, the number of rotated dims of a head, which transformers' class ignores."""
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    given = {name: value for name, value in config.rope_parameters.items() if value is not None}
    partial = getattr(config, "rotary_dim", None) or head_dim * given.pop(
        "partial_rotary_factor", 1
    )
    whole = {} if partial == head_dim else {"partial_rotary_factor": partial / head_dim}
    return {"mixers.S.rope_parameters": given | whole}


def _write_rotary(flat: r.Flat) -> r.Flat:
    partial = (flat.get("mixers.S.rope_parameters") or {}).get("partial_rotary_factor", 1)
    return {} if partial == 1 else {"rotary_dim": round(flat["mixers.S.head_dim"] * partial)}


def _own_words(config: r.Flat) -> r.Flat:
    """Rename the keys of MiniMax's published code to those of transformers."""
    kinds = ("linear_attention", "full_attention")
    words = {
        f"layernorm_{theirs}_{factor}": f"{ours}_{factor}_factor"
        for theirs, ours in zip((*kinds, "mlp"), ("linear_attn", "full_attn", "mlp"), strict=True)
        for factor in ("alpha", "beta")
    }
    given = config.get("attn_type_list")
    if not isinstance(given, list) or not {*given} <= {0, 1}:
        raise ValueError(
            "attn_type_list: expected 0 (linear) or 1 (softmax) for each layer, got " + repr(given)
        )
    layers = {"layer_types": [kinds[kind] for kind in given]}
    return {words.get(name, name): value for name, value in config.items()} | layers


def _slopes(options: Any, layer: int, layers: int) -> torch.Tensor:
    """Return the published decay rate of each head, (H, 1, 1), as in our lightning attention."""
    base = 1 / (2 ** (8 / options.num_heads))
    depth = 1 - layer / (layers - 1 + 1e-5) + 1e-5
    return (base ** (torch.arange(options.num_heads) + 1) * depth)[:, None, None]


def _query_decay(options: Any, layer: int, layers: int) -> torch.Tensor:
    steps = torch.arange(BLOCK) + 1
    return torch.exp(-_slopes(options, layer, layers) * steps[:, None])


def _key_decay(options: Any, layer: int, layers: int) -> torch.Tensor:
    steps = torch.arange(BLOCK) + 1
    return torch.exp(-_slopes(options, layer, layers) * (BLOCK - steps[:, None]))


def _diagonal_decay(options: Any, layer: int, layers: int) -> torch.Tensor:
    steps = torch.arange(BLOCK) + 1
    apart = (steps[:, None] - steps[None, :])[None, None]
    decay = _slopes(options, layer, layers) * apart
    return torch.exp(torch.where(decay >= 0, -decay, float("-inf")))


MINIMAX = r.register_family(
    r.Family(
        name="minimax",
        architecture="MiniMaxForCausalLM",
        limits=published.other_minimax,
        published=published.minimax,
        letters={"L": "lightning_attention", "S": "softmax_attention"},
        aliases={"minimax_text_01": _own_words, "minimax_m1": _own_words},
        config=(
            *r.SIZES,
            r.key("rms_norm_eps", "norm_eps"),
            r.always(norm_position="normed"),
            *r.attention(),
            r.both("rotary_dim", read=_read_rotary, write=_write_rotary),
            r.must("postnorm", True),
            r.must("shared_intermediate_size", 0),
            r.key("num_attention_heads", "mixers.S.num_heads", "mixers.L.num_heads"),
            r.key("head_dim", "mixers.S.head_dim", "mixers.L.head_dim", "mixers.L.value_head_dim"),
            r.always(mixers__L__output_norm_eps=1e-6),
            r.must("hidden_act", "silu"),
            r.must("sliding_window", None),
            *(
                r.key(f"{theirs}_{factor}_factor", *[f"residuals.{s}.{option}" for s in symbols])
                for theirs, symbols in (("full_attn", "S"), ("linear_attn", "L"), ("mlp", "E"))
                for factor, option in (("alpha", "skip_multiplier"), ("beta", "output_multiplier"))
            ),
            r.key("num_local_experts", "feed_forwards.E.num_experts"),
            r.key("num_experts_per_tok", "feed_forwards.E.top_k"),
            r.key("intermediate_size", "feed_forwards.E.intermediate_size"),
            r.must("block_size", BLOCK),
            r.ignored("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
        ),
        mixers=r.by_type(linear_attention="L", full_attention="S"),
        ffn=r.everywhere("E"),
        weights=(
            *r.ends(),
            *r.PRE_NORMS,
            *r.ATTENTION_WEIGHTS,
            r.rule(
                f"{THEIRS}qkv_proj.weight",
                [f"{r.MIXER}{name}_proj.weight" for name in "qkv"],
                r.Split(groups=lambda options: options.num_heads),
                mixer="L",
            ),
            *r.renames(
                THEIRS,
                r.MIXER,
                {"norm": "norm.norm", "out_proj": "o_proj", "output_gate": "gate_proj"},
                mixer="L",
            ),
            r.constant(f"{THEIRS}slope_rate", _slopes, mixer="L"),
            r.constant(f"{THEIRS}query_decay", _query_decay, mixer="L"),
            r.constant(f"{THEIRS}key_decay", _key_decay, mixer="L"),
            r.constant(f"{THEIRS}diagonal_decay", _diagonal_decay, mixer="L"),
            r.rule(f"{r.LAYER}block_sparse_moe.gate.weight", f"{r.FFN}router.weight", ffn="E"),
            *r.experts(f"{r.LAYER}block_sparse_moe.experts.", ("w1", "w3", "w2")),
        ),
    )
)

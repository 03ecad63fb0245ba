"""Tensor parallel plans: which Linear layers of a layout transformers may split over processes.

What has no entry is replicated, so that the logits are those of one process.
"""

from __future__ import annotations

from hybrid.config.hybrid_config import HybridConfig
from hybrid.config.spec import MixerSpec
from hybrid.ffn.dense import ACTIVATIONS, Dense, DenseOptions
from hybrid.mixers.softmax_attention import SoftmaxAttention


def tensor_plan(config: HybridConfig) -> dict[str, str]:
    """The plan of the stack, with `*` for every layer; empty where nothing can be split.

    transformers' plans do not tell layers apart, so softmax mixers are split only where all mixers
    are plain softmax attention, and feed-forwards only where no canon layer reads their channels.
    """
    stack = config.stack
    if any(layer.shared is not None or layer.canon for layer in stack):
        return {}
    plan: dict[str, str] = {}
    if all(len(layer.mixers) < 2 for layer in stack) and all(map(_splits, stack.mixers.values())):
        for name in ("q_proj", "k_proj", "v_proj", "gate_proj"):
            plan[f"layers.*.mixer.{name}"] = "colwise"
        plan["layers.*.mixer.o_proj"] = "rowwise"
        options = [mixer.options for mixer in stack.mixers.values()]
        gates = any(o.output_gate for o in options)
        if not gates:
            del plan["layers.*.mixer.gate_proj"]
        if not options:
            plan = {}
        if any(o.qk_norm for o in options):
            plan["layers.*.mixer.q_norm"] = "replicated_with_grad_allreduce"
            plan["layers.*.mixer.k_norm"] = "replicated_with_grad_allreduce"
    dense = list(_dense(config).values())
    if dense:
        plan["layers.*.ffn.up_proj"] = "colwise"
        plan["layers.*.ffn.down_proj"] = "rowwise"
        if any(ACTIVATIONS[o.activation][0] for o in dense):
            plan["layers.*.ffn.gate_proj"] = "colwise"
    return plan


def check_world(config: HybridConfig, size: int) -> None:
    """Raise ValueError by the name of what `size` processes cannot split evenly."""
    plan = tensor_plan(config)
    if not plan:
        raise ValueError(
            f"tensor parallelism: layout {config.layout!r} has nothing to split; it takes plain softmax"
            " attention in every mixer or dense feed-forwards, without canon layers and shared"
            " layers. Leave tp_plan and tp_size out, and use data parallelism"
        )
    wrong = []
    if "layers.*.mixer.q_proj" in plan:
        for symbol, mixer in config.stack.mixers.items():
            kv_heads = mixer.options.sizes[1]
            if kv_heads % size:
                wrong.append(f"mixer {symbol!r} has num_kv_heads {kv_heads}")
    for symbol, options in _dense(config).items():
        if plan and options.width % size:
            wrong.append(f"feed-forward {symbol!r} has intermediate_size {options.width}")
    if wrong:
        raise ValueError(
            f"tensor parallelism over {size} processes: {'; '.join(wrong)}, which {size} does not"
            " divide; choose a tp_size that divides them"
        )


def _splits(mixer: MixerSpec) -> bool:
    """Whether the heads of a mixer are independent of each other up to its output projection."""
    plain = mixer.cls is SoftmaxAttention and mixer.cls.fits_paged(mixer.options)
    return plain and not mixer.canon and mixer.options.qk_norm != "layer"


def _dense(config: HybridConfig) -> dict[str, DenseOptions]:
    found = sorted(config.stack.feed_forwards.items())
    return {s: part.options for s, part in found if issubclass(part.cls, Dense)}

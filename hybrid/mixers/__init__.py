"""Token mixers.

Each module is imported on first use of its mixer or of one of its names.
"""

import lazy_loader

from hybrid.config.registry import mixers

mixers.declare(
    __name__,
    {
        "chunked_attention": ("B", "ChunkedAttention"),
        "comba": ("c", "Comba"),
        "delta_net": ("P", "DeltaNet"),
        "dfw": ("F", "DecayingFastWeights"),
        "forgetting_attention": ("f", "ForgettingAttention"),
        "gated_delta_net": ("D", "GatedDeltaNet"),
        "gated_delta_net2": ("e", "GatedDeltaNet2"),
        "gated_delta_product": ("d", "GatedDeltaProduct"),
        "gated_linear_attention": ("G", "GatedLinearAttention"),
        "retention": ("T", "Retention"),
        "gated_retention": ("Y", "GatedRetention"),
        "gated_short_convolution": ("C", "GatedShortConvolution"),
        "gated_slot_attention": ("g", "GatedSlotAttention"),
        "gateloop": ("O", "GateLoop"),
        "hgrn2": ("H", "HGRN2"),
        "kimi_delta_attention": ("K", "KimiDeltaAttention"),
        "lightning_attention": ("L", "LightningAttention"),
        "mamba": ("m", "Mamba"),
        "mamba2": ("M", "Mamba2"),
        "mamba3": ("t", "Mamba3"),
        "mlstm": ("X", "MLSTM"),
        "multi_head_latent_attention": ("A", "MultiHeadLatentAttention"),
        "native_sparse_attention": ("V", "NativeSparseAttention"),
        "norm_attention": ("N", "NormAttention"),
        "rg_lru": ("U", "RGLRU"),
        "rwkv6": ("R", "RWKV6"),
        "rwkv7": ("r", "RWKV7"),
        "rwkv_channel_mix": (None, "RWKVChannelMix"),
        "sliding_window_attention": ("W", "SlidingWindowAttention"),
        "softmax_attention": ("S", "SoftmaxAttention"),
    },
)

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

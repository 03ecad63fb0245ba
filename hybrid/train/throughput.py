"""Hardware utilisation of a run: FLOPs from each mixer's own count, relative to the device's peak."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hybrid.config.hybrid_config import HybridConfig
from hybrid.plan import plan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, TrainingArguments

# Dense bfloat16 FLOPs per second of one device, from the makers' data sheets. The first name that the
# device's own name contains is used.
PEAK_BF16 = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "MI300X": 1307e12,
    "MI250X": 383e12,
}


def training_flops_per_token(config: PreTrainedConfig, length: int) -> float | None:
    """Return the FLOPs per token, forward and backward, in rows of ``length`` tokens.

    The row counts as one document. Each mixer counts its own operations (see ``hybrid.plan``); not
    every layer counts as softmax. None for a model of another package.
    """
    if not isinstance(config, HybridConfig):
        return None
    return plan(config, length).training_flops_per_token


def peak_flops(args: TrainingArguments) -> float | None:
    """Return the peak FLOPs per second of all devices of a run; None if no data sheet is known."""
    if args.device.type != "cuda" or not (args.bf16 or args.fp16):
        return None
    name = torch.cuda.get_device_name(args.device)
    known = [peak for device, peak in PEAK_BF16.items() if device in name]
    return known[0] * args.world_size if known else None

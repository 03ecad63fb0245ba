"""Training requirements of context parallelism (``hybrid.modeling.context_parallel``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch.distributed as dist
from torch.utils.data import Dataset

from hybrid.config.hybrid_config import HybridConfig
from hybrid.config.options import ConfigError
from hybrid.data.mixture import Mixture
from hybrid.data.slices import FilledRows, SlicedRows
from hybrid.modeling.context_parallel import ContextGroup
from hybrid.modeling.model import HybridModel

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, TrainingArguments

    from hybrid.train.config import TrainConfig

# Attention implementations with an explicit mask for documents that start on other processes.
MASKED = ("sdpa", "eager", "flex_attention")

R = TypeVar("R", bound=Mixture | FilledRows)


def check_slices(config: TrainConfig, args: TrainingArguments, made: PreTrainedConfig) -> None:
    """Refuse configurations that cannot be split over ``context_parallel`` processes.

    Raises:
        ConfigError: with one line for each reason.
    """
    parts, mistakes = config.context_parallel, []
    if parts == 1:
        return
    if args.world_size % parts:
        mistakes.append(
            f"context_parallel: expected a divisor of the {args.world_size} processes, got {parts}"
        )
        raise ConfigError(mistakes)
    if config.sequence_length % parts:
        mistakes.append(
            f"context_parallel: expected a divisor of sequence_length {config.sequence_length}, got"
            f" {parts}"
        )
    if not isinstance(made, HybridConfig):
        mistakes.append(f"context_parallel: expected a hybrid model, got {made.model_type!r}")
    else:
        mistakes += _unable(made)
    if config.packing == "none":
        mistakes.append(
            "context_parallel: expected packed rows, got packing: none; try packing: true"
        )
    implementation = getattr(made, "_attn_implementation", None) or "sdpa"
    if implementation not in MASKED:
        mistakes.append(
            f"context_parallel: expected one of the attention implementations {', '.join(MASKED)},"
            f" which mask documents across processes, got {implementation!r}"
        )
    if config.probes:
        mistakes.append(
            "probes: expected none with context_parallel; try to evaluate the checkpoints"
        )
    if mistakes:
        raise ConfigError(mistakes)


def _unable(made: HybridConfig) -> list[str]:
    lines = []
    if made.num_mtp_layers:
        lines.append(
            f"context_parallel: expected num_mtp_layers: 0, got {made.num_mtp_layers}; try 0, or"
            " import without the modules (--no-mtp)"
        )
    symbols = {symbol for layer in made.layers for symbol in layer.mixers}
    for symbol in sorted(symbols):
        cls = made.stack.mixers[symbol].cls
        if not cls.continues_packed:
            lines.append(
                f"context_parallel: expected mixers that continue packed documents, got {cls.name}"
                f" ({symbol})"
            )
    return lines


def sliced(rows: R, parts: int, batch: int) -> R | SlicedRows:
    """Return rows in the order of the groups' processes; unchanged for groups of one."""
    return rows if parts == 1 else SlicedRows(rows, parts, batch)


def held_out(rows: Mixture, parts: int, batch: int, processes: int) -> Dataset:
    """Return evaluation rows, padded so that every process has the same number of batches."""
    groups = processes // parts
    return sliced(rows if processes == 1 else FilledRows(rows, groups * batch), parts, batch)


def spread(model: nn.Module | None, parts: int) -> None:
    """Let every group of ``parts`` consecutive processes share its rows."""
    if parts == 1:
        return
    assert model is not None
    ranks = range(dist.get_world_size())
    groups = [list(ranks[i : i + parts]) for i in range(0, len(ranks), parts)]
    own, _ = dist.new_subgroups_by_enumeration(groups)
    assert isinstance(own, dist.ProcessGroup)
    for module in model.modules():
        if isinstance(module, HybridModel):
            module.context_group = ContextGroup(own)

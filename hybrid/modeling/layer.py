"""One layer of the stack: mixers, feed-forward, residuals, canon layers and shared weights.

Shapes: B batch, T time, D model dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hybrid.config.spec import LayerSpec
from hybrid.ffn import FeedForward
from hybrid.ffn.dense import Dense
from hybrid.mixers import Mixer
from hybrid.modeling.canon import Canon
from hybrid.modeling.residual import ParallelMixers, Residual
from hybrid.modeling.weight_sharing import adapt, narrow_output
from hybrid.nn.arguments import MIXER_ARGUMENTS, check_arguments
from hybrid.nn.packing import WHOLE_ROWS, Segments
from hybrid.nn.past import Past, Slot

__all__ = ["HybridLayer", "Masks", "ParallelMixers", "Residual"]

Masks = dict[str, Any]
"""Masks by layer type: a tensor or None, or ``LocalRows`` for mixers with bounded reach."""


class Call(NamedTuple):
    """Arguments of a layer besides the residual stream."""

    masks: Masks
    positions: dict[str, tuple[torch.Tensor, torch.Tensor]]
    segments: Segments
    past: Past | None
    kwargs: dict[str, Any]


class HybridLayer(GradientCheckpointingLayer):
    """Layer of the layout: mixers, a feed-forward, or both, each with its own residual."""

    residual_projections = ("depth_projection",)

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.layer_idx = spec.layer_idx
        self.symbols = spec.symbols
        self.shared = spec.shared
        self.mixer = self._build_mixer(spec)
        self.mixer_residual: Residual | None = None
        if spec.mixer_branch is not None:
            self.mixer_residual = Residual(spec.mixer_branch)
        self.ffn: FeedForward | None = None
        self.ffn_residual: Residual | None = None
        if spec.ffn is not None and spec.ffn_branch is not None:
            self.ffn = spec.ffn.build(spec.layer_idx)
            self.ffn_residual = Residual(spec.ffn_branch)
        self.canon = self._build_canon(spec)
        self._build_own_depth(spec)

    @property
    def reads_embeddings(self) -> bool:
        """Whether the layer also reads the embeddings, the input of the stack."""
        return self.shared is not None and self.shared.concat_embeddings

    @property
    def feeds_next(self) -> bool:
        """Whether the output is an extra input of the next layer and not the residual stream."""
        return self.shared is not None and self.shared.output == "next"

    def _build_mixer(self, spec: LayerSpec) -> Mixer | ParallelMixers | None:
        built = []
        for part in spec.mixers:
            mixer = part.build(spec.layer_idx)
            if part.sizes.hidden_size != spec.hidden_size:
                narrow_output(mixer, spec.hidden_size)
            if part.canon:
                mixer.conv.residual = True
            built.append(mixer)
        if len(built) > 1:
            return ParallelMixers(spec, built)
        return built[0] if built else None

    def _build_canon(self, spec: LayerSpec) -> nn.ModuleDict:
        """Return the layer's own canon layers by position; position B is in the mixers."""
        widths = {"C": spec.hidden_size}
        if spec.mixer_branch is not None:
            widths["A"] = spec.mixer_branch.input_size
        if self.ffn is not None and self.ffn.takes_canon:
            widths["D"] = cast(Dense, self.ffn).hidden_channels
        return nn.ModuleDict({at: Canon(widths[at], spec.canon_width) for at in spec.canon})

    def _build_own_depth(self, spec: LayerSpec) -> None:
        """Build the modules that a layer with shared weights does not share: adapters, a projection."""
        self.depth_projection = None
        if self.shared is None:
            return
        if self.shared.lora_rank is not None:
            adapt(self.symbols, (self.mixer, self.ffn), self.shared)
        if self.shared.depth_projection:
            self.depth_projection = nn.Linear(spec.hidden_size, spec.hidden_size, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        beside: torch.Tensor | None = None,
        embeddings: torch.Tensor | None = None,
        *,
        attention_mask: Masks,
        position_embeddings: dict[str, tuple[torch.Tensor, torch.Tensor]],
        segments: Segments = WHOLE_ROWS,
        past: Past | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Run the layer.

        Args:
            x: residual stream, (B, T, D).
            beside: output of a previous layer with ``feeds_next``, (B, T, D). The first branch reads
                x + beside.
            embeddings: input of the stack, (B, T, D), for layers with ``reads_embeddings``. The first
                three arguments are positional, as reentrant checkpointing computes no other gradients.
            attention_mask: masks by layer type.
            position_embeddings: (cos, sin) by symbol.
            segments: document boundaries and padding.
            past: access to earlier tokens (see ``hybrid.nn.past``); None for none.
            kwargs: keyword arguments of attention functions.

        Returns:
            The residual stream after the layer, (B, T, D), or the extra input of the next layer if
            ``feeds_next``.
        """
        check_arguments("HybridLayer", HybridLayer.forward, kwargs, MIXER_ARGUMENTS)
        call = Call(attention_mask, position_embeddings, segments, past, kwargs)
        source = x if beside is None else x + beside
        y = x
        if self.mixer_residual is not None:
            if self.reads_embeddings:
                assert embeddings is not None
                source = torch.cat([source, embeddings], dim=-1)
            h, y = self.mixer_residual.enter(y, source)
            y = self.mixer_residual.leave(y, self._mix(self._canon("A", h, call), call))
            source = None
        if self.ffn is not None and self.ffn_residual is not None:
            h, y = self.ffn_residual.enter(y, source)
            y = self.ffn_residual.leave(y, self._feed_forward(self._canon("C", h, call), call))
        if self.depth_projection is not None:
            y = self.depth_projection(y)
        if self.shared is not None and self.shared.output == "add":
            y = x + y
        return y if past is None else past.tie(y)

    def _mix(self, h: torch.Tensor, call: Call) -> torch.Tensor:
        if isinstance(self.mixer, ParallelMixers):
            return self.mixer(h, self._mixer_calls(list(self.mixer.branches), call))
        assert self.mixer is not None
        return self.mixer(h, **self._mixer_calls([self.mixer], call)[0])[0]

    def _mixer_calls(self, mixers: Sequence[nn.Module], call: Call) -> list[dict[str, Any]]:
        """Return the keyword arguments of each mixer."""
        return [
            {
                **call.kwargs,
                "attention_mask": call.masks.get(cast(Mixer, mixer).layer_type),
                "position_embeddings": call.positions.get(symbol),
                "segments": call.segments,
                "cache": self._slot(call.past, slot_idx),
            }
            for slot_idx, (symbol, mixer) in enumerate(zip(self.symbols, mixers, strict=True))
        ]

    def _feed_forward(self, h: torch.Tensor, call: Call) -> torch.Tensor:
        assert self.ffn is not None
        if "D" not in self.canon:
            return self.ffn(h)
        return self.ffn(h, convolve=lambda inner: self._canon("D", inner, call))

    def _canon(self, at: str, x: torch.Tensor, call: Call) -> torch.Tensor:
        """Apply the canon layer at a position, if any. Canon slots follow those of the mixers."""
        if at not in self.canon:
            return x
        slot = self._slot(call.past, len(self.symbols) + list(self.canon).index(at))
        return cast(Canon, self.canon[at]).run(x, call.segments, slot)

    def _slot(self, past: Past | None, slot_idx: int) -> Slot | None:
        return None if past is None else past.slot(self.layer_idx, slot_idx)

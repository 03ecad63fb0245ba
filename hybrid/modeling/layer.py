"""One layer of the stack: its mixers and its feed-forward, and what is around them.

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
from hybrid.ffn.router import Router
from hybrid.mixers import Mixer
from hybrid.mixers.base import residual_projection
from hybrid.modeling.canon import Canon
from hybrid.modeling.residual import ParallelMixers, Residual
from hybrid.modeling.weight_sharing import adapt, narrow_output
from hybrid.nn.arguments import MIXER_ARGUMENTS, check_arguments
from hybrid.nn.packing import WHOLE_ROWS, Segments
from hybrid.nn.past import Past, Slot

__all__ = ["HybridLayer", "Masks", "ParallelMixers", "Residual"]

Masks = dict[str, Any]
"""By the type of a mixer: a tensor or None, or `LocalRows` for those of bounded reach."""


class Call(NamedTuple):
    """What a layer is called with beside the stream."""

    masks: Masks
    positions: dict[str, tuple[torch.Tensor, torch.Tensor]]
    segments: Segments
    past: Past | None
    kwargs: dict[str, Any]


class HybridLayer(GradientCheckpointingLayer):
    """One layer of the layout: mixer(s), a feed-forward, or both, each with its own residual."""

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
        if spec.deepnorm:
            self._mark_value_paths()

    @property
    def reads_embeddings(self) -> bool:
        """Whether it wants what the stack began with."""
        return self.shared is not None and self.shared.concat_embeddings

    @property
    def feeds_next(self) -> bool:
        """Whether what it returns is for the next layer, and not the stream."""
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
        """The layer's own canon layers, by position; B is in the mixers."""
        widths = {"C": spec.hidden_size}
        if spec.mixer_branch is not None:
            widths["A"] = spec.mixer_branch.input_size
        if self.ffn is not None and self.ffn.takes_canon:
            widths["D"] = cast(Dense, self.ffn).hidden_channels
        return nn.ModuleDict({at: Canon(widths[at], spec.canon_width) for at in spec.canon})

    def _build_own_depth(self, spec: LayerSpec) -> None:
        """What a layer of shared weights has to itself: adapters and a projection."""
        self.depth_projection = None
        if self.shared is None:
            return
        if self.shared.lora_rank is not None:
            adapt(self.symbols, (self.mixer, self.ffn), self.shared)
        if self.shared.depth_projection:
            self.depth_projection = residual_projection(spec.hidden_size, spec.hidden_size)

    def _mark_value_paths(self) -> None:
        """What DeepNorm starts smaller: values, outputs and feed-forwards, not queries and keys."""
        for name, module in self.named_modules():
            last = name.rpartition(".")[2]
            in_ffn = name.startswith("ffn.") and not isinstance(module, Router)
            if in_ffn or last == "v_proj" or hasattr(module, "is_residual_projection"):
                module.is_value_path = True  # type: ignore[assignment]

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
        """The stream after this layer; of a layer that feeds the next, what it feeds.

        Args:
            x: the stream, (B, T, D).
            beside: what the layer before feeds this one, (B, T, D): its first branch reads x + beside.
            embeddings: what the stack began with, (B, T, D), for layers that read it again. These
                three are positional: reentrant checkpointing finds gradients of no others.
            attention_mask, position_embeddings: by layer type; by symbol.
            segments: documents and padding.
            past: where the tokens before these are (see `hybrid.nn.past`); None where none are.
            kwargs: for attention functions.
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
        """The keyword arguments of each mixer."""
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
        """x + convolution of x where this layer has one at that position; their slots come last."""
        if at not in self.canon:
            return x
        slot = self._slot(call.past, len(self.symbols) + list(self.canon).index(at))
        return cast(Canon, self.canon[at]).run(x, call.segments, slot)

    def _slot(self, past: Past | None, slot_idx: int) -> Slot | None:
        return None if past is None else past.slot(self.layer_idx, slot_idx)

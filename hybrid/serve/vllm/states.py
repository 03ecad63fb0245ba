"""States on vLLM's pages: one page for each request and slot, gathered and scattered in each step.

A page is one row of float32 words with both states of a slot: first the recurrent one, then that of the
convolution in the model's dtype. One row, because prefix caching copies a page whole; the largest slot
sets the size of all pages, keys and values included.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.linear_attn import (
    LinearAttentionBackend,
    LinearAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import MambaSpec

from hybrid.nn.packing import Segments
from hybrid.nn.past import Past

Elements = tuple[int, int]
"""Of the float32 state, and of the convolution's in the model's dtype (`Mixer.state_elements`)."""


def page_words(elements: Elements, dtype: torch.dtype) -> int:
    """Words of four bytes that both states of a slot take."""
    return elements[0] + -(-elements[1] * dtype.itemsize // 4)


class _Builder(LinearAttentionMetadataBuilder):
    """vLLM's, whose tensors are new in each step: a captured graph would read old ones."""

    _cudagraph_support = AttentionCGSupport.NEVER


class _Backend(LinearAttentionBackend):
    @staticmethod
    def get_builder_cls() -> type[_Builder]:
        return _Builder


@dataclass(frozen=True)
class Batch:
    """The requests of one step.

    Attributes:
        rows: (N,) int64, the page of each; None in a run that only measures memory.
        new: (N,) bool, which of them begin; None for none.
    """

    rows: torch.Tensor | None = None
    new: torch.Tensor | None = None

    @classmethod
    def from_metadata(cls, metadata: Any) -> Batch:
        """The batch of vLLM's metadata for linear attention.

        A request begins where its tokens of this step are all that it has: also one of a single token,
        which vLLM counts as decoding.
        """
        lengths = metadata.query_start_loc.diff()
        new = metadata.seq_lens[: len(lengths)] == lengths
        if (
            new.device.type == "cpu" and not new.any()
        ):  # elsewhere, looking would wait for the device
            new = None
        return cls(metadata.state_indices_tensor[: len(lengths)].long(), new)


class StatePages(nn.Module, MambaBase):
    """The pages of one slot, as a layer of vLLM's.

    Args:
        elements: of its two states.
        vllm_config: vLLM's.
        prefix: its name, which holds one integer only.
        page_bytes: of the largest slot of the stack.
    """

    mamba_type = MambaAttentionBackendEnum.LINEAR

    def __init__(
        self, elements: Elements, vllm_config: VllmConfig, prefix: str, page_bytes: int
    ) -> None:
        super().__init__()
        self.prefix, self.elements, self.page_bytes = prefix, elements, page_bytes
        self.dtypes = torch.float32, vllm_config.model_config.dtype
        self.kv_cache: tuple[torch.Tensor, ...] = ()
        self.shapes: list[torch.Size | None] = [None, None]
        context = vllm_config.compilation_config.static_forward_context
        assert prefix not in context
        context[prefix] = self

    def get_state_shape(self) -> Iterable[tuple[int, ...]]:
        """One row of words."""
        return ((page_words(self.elements, self.dtypes[1]),),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """Words are float32."""
        return (torch.float32,)

    def get_attn_backend(self) -> type[LinearAttentionBackend]:
        """vLLM's for linear attention, without captured graphs."""
        return _Backend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> MambaSpec:
        """vLLM's, with pages of the largest slot where no softmax layer sets their size."""
        spec = super().get_kv_cache_spec(vllm_config)
        assert isinstance(spec, MambaSpec)
        if spec.page_size_padded is None:
            spec = replace(spec, page_size_padded=self.page_bytes)
        return spec

    def read(self, kind: int, batch: Batch) -> torch.Tensor | None:
        """The states (N, ...) that the requests continue from; None where none has been stored."""
        shape = self.shapes[kind]
        if batch.rows is None or shape is None:
            return None
        rows = self._pages(kind)[batch.rows].unflatten(1, shape)
        if batch.new is not None:
            rows.masked_fill_(batch.new.view(-1, *[1] * len(shape)), 0)
        return rows

    def write(self, kind: int, batch: Batch, state: torch.Tensor) -> None:
        """Store the states (N, ...) that the requests end with."""
        self.shapes[kind] = state.shape[1:]
        if batch.rows is not None:
            self._pages(kind)[batch.rows] = state.flatten(1).to(self.dtypes[kind])

    def _pages(self, kind: int) -> torch.Tensor:
        """(pages, elements) of the float32 state (0), or of the convolution's (1)."""
        first, second = self.elements
        words = self.kv_cache[0]
        return words[:, :first] if kind == 0 else words[:, first:].view(self.dtypes[1])[:, :second]


@dataclass(frozen=True)
class PagedSlot:
    """`hybrid.nn.past.Slot`: states on pages, keys and values left to vLLM's attention."""

    pages: StatePages | None
    batch: Batch

    def update_kv(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of the new tokens: the attention function stores them."""
        return k, v

    def recurrent_state(self) -> torch.Tensor | None:
        """Of each request, zeros for new ones."""
        assert self.pages is not None
        return self.pages.read(0, self.batch)

    def set_recurrent_state(self, state: torch.Tensor) -> None:
        """Store it."""
        assert self.pages is not None
        self.pages.write(0, self.batch, state)

    def conv_state(self) -> torch.Tensor | None:
        """Of each request, zeros for new ones."""
        assert self.pages is not None
        return self.pages.read(1, self.batch)

    def set_conv_state(self, state: torch.Tensor) -> None:
        """Store it."""
        assert self.pages is not None
        self.pages.write(1, self.batch, state)

    def resume(
        self, x: torch.Tensor, segments: Segments, run: Callable[[torch.Tensor], object]
    ) -> None:
        """Nothing: vLLM takes no token back."""


@dataclass(frozen=True)
class PagedPast(Past):
    """The pages of every slot in one step, and the requests of each."""

    pages: Mapping[tuple[int, int], StatePages]
    batches: Mapping[tuple[int, int], Batch]

    def slot(self, layer_idx: int, state_idx: int) -> PagedSlot:
        """See `Past`."""
        key = (layer_idx, state_idx)
        return PagedSlot(self.pages.get(key), self.batches.get(key, Batch()))

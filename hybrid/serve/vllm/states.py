"""States on vLLM's pages: one page for each request and slot, gathered and scattered in each step.

A page is one row of float32 words with all states of a slot, whatever their dtypes: one row, because
prefix caching copies a page whole. The largest slot sets the size of all pages, keys and values too.
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
from hybrid.nn.past import Past, StateSpec

Key = tuple[int, int]
"""A layer, and a slot of it, as `Past.slot` counts them."""

WORD = 4


@dataclass(frozen=True)
class Page:
    """The layout of a page: the states of a slot one behind the other, each from a whole word on.

    Attributes:
        specs: the states by name, each with its dtype.
    """

    specs: Mapping[str, StateSpec]

    @classmethod
    def of(cls, states: Mapping[str, StateSpec], dtype: torch.dtype) -> Page:
        """The page of what a mixer declares, in a model of `dtype`."""
        return cls({name: replace(s, dtype=s.dtype or dtype) for name, s in states.items()})

    @property
    def words(self) -> int:
        """Words in all."""
        return sum(map(_words, self.specs.values()))

    def view(self, pages: torch.Tensor, name: str) -> torch.Tensor:
        """One state of all pages, (pages, elements), of pages (pages, words)."""
        start = 0
        for other, spec in self.specs.items():
            if other == name:
                assert spec.dtype is not None
                part = pages[:, start : start + _words(spec)].view(spec.dtype)
                return part[:, : spec.elements]
            start += _words(spec)
        raise KeyError(name)


def _words(spec: StateSpec) -> int:
    assert spec.dtype is not None
    return -(-spec.elements * spec.dtype.itemsize // WORD)


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
        page: its layout.
        vllm_config: vLLM's.
        prefix: its name, which holds one integer only.
        page_bytes: of the largest slot of the stack.
    """

    mamba_type = MambaAttentionBackendEnum.LINEAR

    def __init__(self, page: Page, vllm_config: VllmConfig, prefix: str, page_bytes: int) -> None:
        super().__init__()
        self.prefix, self.page, self.page_bytes = prefix, page, page_bytes
        self.kv_cache: tuple[torch.Tensor, ...] = ()
        context = vllm_config.compilation_config.static_forward_context
        assert prefix not in context
        context[prefix] = self

    def get_state_shape(self) -> Iterable[tuple[int, ...]]:
        """One row of words."""
        return ((self.page.words,),)

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

    def read(self, name: str, batch: Batch) -> torch.Tensor | None:
        """The states (N, ...) that the requests continue from; None in a run that measures memory."""
        if batch.rows is None:
            return None
        rows = self.page.view(self.kv_cache[0], name).index_select(0, batch.rows)
        if batch.new is not None:
            rows.masked_fill_(batch.new[:, None], 0)
        return rows.unflatten(1, self.page.specs[name].shape)

    def write(self, name: str, batch: Batch, state: torch.Tensor) -> None:
        """Store the states (N, ...) that the requests end with."""
        if batch.rows is not None:
            pages = self.page.view(self.kv_cache[0], name)
            pages.index_copy_(0, batch.rows, state.flatten(1).to(pages.dtype))


@dataclass(frozen=True)
class PagedSlot:
    """`hybrid.nn.past.Slot`: states on pages, keys and values left to vLLM's attention."""

    pages: StatePages | None
    batch: Batch

    def append(
        self,
        *,
        window: int | None = None,
        lengths: torch.Tensor | None = None,
        **tokens: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Those of the new tokens: the attention function stores them, and reads the others."""
        return tuple(tokens.values())

    def state(self, name: str) -> torch.Tensor | None:
        """Of each request, zeros for new ones."""
        assert self.pages is not None
        return self.pages.read(name, self.batch)

    def set_state(self, name: str, value: torch.Tensor) -> None:
        """Store it."""
        assert self.pages is not None
        self.pages.write(name, self.batch, value)

    def begin(
        self, x: torch.Tensor, segments: Segments, run: Callable[[torch.Tensor], object]
    ) -> None:
        """Nothing: vLLM takes no token back."""


@dataclass(frozen=True)
class PagedPast(Past):
    """The pages of every slot in one step, and the requests of each."""

    pages: Mapping[Key, StatePages]
    batches: Mapping[Key, Batch]

    def slot(self, layer_idx: int, slot_idx: int) -> PagedSlot:
        """See `Past`."""
        key = (layer_idx, slot_idx)
        return PagedSlot(self.pages.get(key), self.batches.get(key, Batch()))

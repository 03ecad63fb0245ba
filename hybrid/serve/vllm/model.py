"""The model class that vLLM runs: a hybrid's own stack over vLLM's pages.

Shapes: T tokens of a step, N requests, D model dim, V vocabulary.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.initialization import no_init_weights
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator

from hybrid.config.hybrid_config import HybridConfig
from hybrid.mixers.attention import SoftmaxMixer
from hybrid.modeling.layer import HybridLayer, ParallelMixers
from hybrid.modeling.model import HybridForCausalLM
from hybrid.nn.packing import WHOLE_ROWS, Segments
from hybrid.serve.vllm import attention, linears
from hybrid.serve.vllm.limits import check_model, check_server
from hybrid.serve.vllm.states import WORD, Batch, Key, Page, PagedPast, StatePages


class HybridForVllm(nn.Module):
    """`HybridForCausalLM` on vLLM's pages."""

    # also of pure softmax stacks; vLLM looks at the config's layer types
    is_hybrid = True
    has_inner_state = True
    supports_pp = False

    @classmethod
    def get_mamba_state_shape_from_config(
        cls, vllm_config: VllmConfig
    ) -> tuple[tuple[int, ...], ...]:
        """The state of the largest slot; pages of keys and values are made as large."""
        return ((_largest_page(vllm_config),),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """Pages are words of float32."""
        return (torch.float32,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        """How prefix caching copies a page: whole."""
        return MambaStateCopyFuncCalculator.linear_attention_state_copy_func()

    @classmethod
    def get_mamba_state_copy_funcs(cls, mamba_types: Iterable[Any]) -> dict[Any, tuple[Any, ...]]:
        """The same for all kinds; there is one."""
        return dict.fromkeys(mamba_types, cls.get_mamba_state_copy_func())

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        check_server(vllm_config)
        self.config = _served(vllm_config)
        check_model(self.config)
        with no_init_weights():
            self.hybrid = HybridForCausalLM(self.config)
        linears.use_vllm_linears(self.hybrid, self.config.stack)
        self.hybrid.tie_weights()
        self.hybrid.eval().requires_grad_(False)
        largest = WORD * _largest_page(vllm_config)
        self.pages: dict[Key, StatePages] = {}
        for i, layer in enumerate(self.hybrid.model.layers):
            # vLLM takes the one integer in a name for the layer's number
            for j, page in _pages(layer, vllm_config.model_config.dtype):
                name = f"layers.{i}.state_{_letter(j)}"
                self.pages[i, j] = StatePages(page, vllm_config, name, largest)
            for j, mixer in enumerate(_mixers(layer)):
                if isinstance(mixer, SoftmaxMixer):
                    attention.attach(mixer, vllm_config, f"layers.{i}.attention_{_letter(j)}")

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(T,) -> (T, D)."""
        return self.hybrid.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """One step of the requests of a batch.

        Args:
            input_ids: (T,), request after request; or `inputs_embeds`: (T, D).
            positions: (T,), of each token in its request.
            intermediate_tensors: of pipeline parallelism, which is not supported.

        Returns:
            The hidden states after the last norm, (T, D).
        """
        x = inputs_embeds
        if x is None:
            assert input_ids is not None
            x = self.embed_input_ids(input_ids)
        segments, batches, single = self._batches(len(x))
        # rows of one token each where every request has one; else one row of documents
        dim = 1 if single else 0
        out = self.hybrid.model.run(
            x.unsqueeze(dim),
            positions.unsqueeze(dim),
            masks={},
            segments=segments,
            past=PagedPast(self.pages, batches),
        )
        return out.flatten(0, 1)

    def _batches(self, tokens: int) -> tuple[Segments, dict[Key, Batch], bool]:
        """The documents of a step, the requests of each slot, and whether all have one token."""
        metadata = get_forward_context().attn_metadata
        if metadata is None or not self.pages:  # a run that measures memory; or no states at all
            return WHOLE_ROWS, {}, False
        made: dict[int, Batch] = {}  # slots whose pages are of one group share metadata
        batches, meta = {}, None
        for key, pages in self.pages.items():
            meta = metadata[pages.prefix]
            if id(meta) not in made:
                made[id(meta)] = Batch.from_metadata(meta)
            batches[key] = made[id(meta)]
        assert meta is not None
        if meta.num_prefills == 0 and meta.num_decodes == tokens:
            return WHOLE_ROWS, batches, True
        return Segments(meta.query_start_loc.to(torch.int32)), batches, False

    def compute_logits(self, hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
        """(..., D) -> (..., V)."""
        return self.hybrid.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Copy the tensors of a checkpoint; those of multi-token prediction are left out.

        Raises:
            ValueError: a tensor that this model does not have.
        """
        own = dict(self.hybrid.named_parameters(remove_duplicate=False))
        own |= dict(self.hybrid.named_buffers(remove_duplicate=False))
        loaded: set[str] = set()
        for name, tensor in weights:
            if name.startswith("mtp."):
                continue
            if name not in own:
                raise ValueError(f"{name}: the checkpoint has this tensor, and the model does not")
            linears.load(own[name], tensor)
            loaded |= {f"hybrid.{n}" for n, y in own.items() if y is own[name]}
        return loaded


def _served(vllm_config: VllmConfig) -> HybridConfig:
    """The config of the checkpoint, with vLLM's attention, and without what only training needs."""
    config: HybridConfig = vllm_config.model_config.hf_config
    served = config.changed(num_mtp_layers=0)
    served._attn_implementation = attention.NAME
    return served


def _largest_page(vllm_config: VllmConfig) -> int:
    """Words of the largest slot; sizes come from modules on no device."""
    config = vllm_config.model_config
    with torch.device("meta"), no_init_weights():
        layers = [HybridLayer(spec) for spec in config.hf_config.stack]
    pages = (page for layer in layers for _, page in _pages(layer, config.dtype))
    return max((page.words for page in pages), default=0)


def _pages(layer: HybridLayer, dtype: torch.dtype) -> Iterator[tuple[int, Page]]:
    """The slots of a layer that have states, and their pages."""
    for i, part in enumerate([*_mixers(layer), *layer.canon.values()]):
        if states := part.states():
            yield i, Page.of(states, dtype)


def _mixers(layer: HybridLayer) -> list[Any]:
    if layer.mixer is None:
        return []
    return list(layer.mixer.branches) if isinstance(layer.mixer, ParallelMixers) else [layer.mixer]


def _letter(number: int) -> str:
    return chr(ord("a") + number)

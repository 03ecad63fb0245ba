"""Model without a head: embeddings, and a stack of layers from the layout.

The padding, the document boundaries, the masks and the positions of a forward pass are found here, once
for all layers.

Shapes: B batch, T time, D model dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import (
    create_causal_mask,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hybrid.config.hybrid_config import HybridConfig
from hybrid.config.spec import LOCAL, StackSpec
from hybrid.modeling.backends import use_backends_of
from hybrid.modeling.cache import CachePast
from hybrid.modeling.context_parallel import ContextGroup, Neighbours
from hybrid.modeling.embeddings import build_embedding
from hybrid.modeling.layer import HybridLayer, Masks
from hybrid.modeling.pretrained import HybridPreTrainedModel
from hybrid.modeling.training_losses import own_losses, warn_of_skipped_losses
from hybrid.modeling.weight_sharing import tied_weights
from hybrid.nn.arguments import (
    ATTENTION_ARGUMENTS,
    CACHE,
    DOCUMENT_ARGUMENTS,
    IGNORED_ARGUMENTS,
    PAGED_ARGUMENTS,
    RECORDING_ARGUMENTS,
    check_arguments,
    pick_cache,
)
from hybrid.nn.cache import is_empty, is_paged, past_length
from hybrid.nn.input_checks import (
    check_cache,
    check_masks,
    check_room,
    check_tokens,
    explain_index,
)
from hybrid.nn.local_rows import LocalRows
from hybrid.nn.norms import build_norm
from hybrid.nn.packing import (
    WHOLE_ROWS,
    Segments,
    check_mask,
    check_positions,
    find_segments,
    name_documents,
)
from hybrid.nn.past import Past

STACK_ARGUMENTS = frozenset(
    {*ATTENTION_ARGUMENTS, *DOCUMENT_ARGUMENTS, *RECORDING_ARGUMENTS, *IGNORED_ARGUMENTS}
)


class HybridModel(HybridPreTrainedModel):
    """Hybrid model without a head: ids (B, T) -> hidden states (B, T, D)."""

    def __init__(self, config: HybridConfig, embed: bool = True) -> None:
        super().__init__(config)
        stack = config.stack
        self.embed_tokens: Any = build_embedding(config) if embed else None
        self.embed_norm: nn.Module | None = None
        if config.embedding_norm and embed:
            self.embed_norm = build_norm(config.norm, config.hidden_size, config.norm_eps)
        self.layers = nn.ModuleList([HybridLayer(layer) for layer in stack])
        use_backends_of(config, self.layers)
        self.rotary = self._build_rotary(stack)
        self.first_key_layer, self.has_keys = stack.first_key_layer, stack.has_keys
        self.has_state, self.has_local = stack.has_state, stack.has_local
        types = {"full_attention": self.has_keys, "linear_attention": self.has_state}
        self.mask_types = tuple(name for name, wanted in types.items() if wanted)
        self.norm = nn.Identity()
        if not stack.ends_normed:
            self.norm = build_norm(config.norm, config.hidden_size, config.norm_eps)
        self._tied_weights_keys = tied_weights(stack, self.layers)
        self.own_losses = own_losses(config)
        self.gradient_checkpointing = False
        self.context_group: ContextGroup | None = None
        self.post_init()

    @staticmethod
    def _build_rotary(stack: StackSpec) -> nn.ModuleDict:
        """Build one rotary embedding per symbol with positions."""
        built = {s: m.cls.rotary(m.options, m.sizes) for s, m in stack.mixers.items()}
        return nn.ModuleDict({s: rotary for s, rotary in built.items() if rotary is not None})

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        losses_follow: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the stack.

        Args:
            input_ids: (B, T) int64 token ids. Pass either ``input_ids`` or ``inputs_embeds``.
            attention_mask: (B, T_past + T) with 0 at padding, on any side; None for no padding. The
                values 1, 2, ... number the documents of a row.
            position_ids: (B, T) int64. With an empty cache, a position that does not follow the
                previous one starts a new document. Documents do not attend to each other.
            cache: cache to continue from, such as ``DynamicCache(config=model.config)``, or None.
            inputs_embeds: (B, T, D) embeddings, in place of ``input_ids``.
            use_cache: whether to return a cache.
            past_key_values: name of ``cache`` in transformers before 5.24.
            losses_follow: whether the caller adds the losses of the config. False: warn of losses that
                are skipped.
            kwargs: keyword arguments of attention functions and of recording; see
                ``hybrid.nn.arguments``. ``cu_seq_lens_q`` or ``seq_idx`` can also mark documents; see
                ``hybrid.nn.packing``.

        Returns:
            Hidden states (B, T, D), the cache, and recorded outputs.

        Raises:
            TypeError: unknown keyword argument.
            ValueError: both or neither of ids and embeddings; packed documents with a cache; a custom
                4-dimensional mask with layers that have a state; a cache in training with gradient
                checkpointing.
        """
        past = pick_cache(cache, past_key_values)
        paged = past if is_paged(past) else None
        known = STACK_ARGUMENTS | PAGED_ARGUMENTS if paged is not None else STACK_ARGUMENTS
        check_arguments("HybridModel", HybridModel.forward, kwargs, known)
        if paged is not None:
            past = None
        check_tokens(input_ids, inputs_embeds, self.config.hidden_size)
        check_cache(past, self.config.layer_types)
        x = self._embed(input_ids) if inputs_embeds is None else inputs_embeds
        batch, time = x.shape[:2]
        check_room(past, past_length(past), time)
        given_cache = past
        if not losses_follow and self.training and torch.is_grad_enabled():
            warn_of_skipped_losses(self.own_losses)
        replayed = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if past is not None and replayed:
            raise ValueError(
                "cache: expected None, as a cache cannot be used in training with gradient"
                " checkpointing, which would write to it again in backward, got a cache; try without it,"
                " or model.gradient_checkpointing_disable()"
            )
        if use_cache and past is None:
            past = DynamicCache(config=self.config)
        neighbours = None
        handed_on = {name: kwargs[name] for name in kwargs if name in ATTENTION_ARGUMENTS}
        if paged is not None:
            segments = WHOLE_ROWS
            masks: Masks = {"full_attention": attention_mask}
            paging = {name: kwargs[name] for name in kwargs if name in PAGED_ARGUMENTS}
            handed_on["paged"] = {**paging, "cache": paged}
        elif self.context_group is not None:
            if attention_mask is not None or past is not None:
                raise ValueError(
                    "attention_mask, cache: expected None with context parallelism, got one of them; try"
                    " rows without padding, packed by position_ids"
                )
            neighbours, masks = self._neighbours(self.context_group, x, position_ids, kwargs)
            segments, position_ids = neighbours.segments, neighbours.position_ids
        else:
            if isinstance(attention_mask, Mapping):
                check_masks(attention_mask, batch, time, self.mask_types, tuple(LOCAL))
            else:
                check_mask(attention_mask, batch, time, past_length(past))
            check_positions(position_ids, batch, time)
            attention_mask, position_ids = name_documents(
                attention_mask, position_ids, kwargs, (batch, time)
            )
            segments = self._segments(attention_mask, position_ids, given_cache, batch, time)
            if segments.packed:
                # later tokens could not use a cache with document boundaries
                past, attention_mask = None, None
            if position_ids is None:
                position_ids = self._positions(attention_mask, past_length(past), time, x.device)
            places = segments.places if segments.packed else position_ids
            assert places is not None
            masks = self._masks(x, attention_mask, past, places)
            if self.has_local and LOCAL[0] not in masks:
                rows = find_local_rows(x, attention_mask, past, segments)
                masks |= dict.fromkeys(LOCAL, rows)
        slots = None if past is None else CachePast(past)
        x = self.run(
            x,
            position_ids,
            masks=masks,
            segments=segments,
            past=neighbours if slots is None else slots,
            **handed_on,
        )
        if slots is not None:
            slots.count(x)
        returned: dict[str, Any] = {CACHE: past}
        return BaseModelOutputWithPast(last_hidden_state=x, **returned)

    def _embed(self, ids: torch.Tensor | None) -> torch.Tensor:
        """(B, T) -> (B, T, D)."""
        try:
            return self.embed_tokens(ids)
        except IndexError as error:
            explain_index(error, "input_ids", ids, self.config.vocab_size)
            raise

    def run(
        self,
        x: torch.Tensor,
        position_ids: torch.Tensor | None,
        *,
        masks: Masks,
        segments: Segments = WHOLE_ROWS,
        past: Past | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Run the stack on embedded tokens, with prepared masks, segments and past.

        Args:
            x: (B, T, D), embedded tokens, before the norm of embeddings.
            position_ids: (1 or B, T).
            masks: masks by layer type, as returned by transformers' mask functions.
            segments: document boundaries and padding.
            past: access to earlier tokens; None for none.
            kwargs: keyword arguments of attention functions.

        Returns:
            The hidden states after the last norm, (B, T, D).
        """
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        positions = {s: rotary(x, position_ids) for s, rotary in self.rotary.items()}
        embeddings, beside = x, None
        for layer in self.layers:
            y = layer(
                x,
                beside,
                embeddings if layer.reads_embeddings else None,
                attention_mask=masks,
                position_embeddings=positions,
                segments=segments,
                past=past,
                position_ids=position_ids,
                **kwargs,
            )
            x, beside = (x, y) if layer.feeds_next else (y, None)
        return self.norm(x)

    def _neighbours(
        self,
        group: ContextGroup,
        x: torch.Tensor,
        position_ids: torch.Tensor | None,
        kwargs: Mapping[str, Any],
    ) -> tuple[Neighbours, Masks]:
        """Return what this process knows of the other slices of its rows, and the masks."""
        for name in ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k"):
            if name in kwargs:
                raise ValueError(
                    f"{name}: expected no such argument with context parallelism, got one; try"
                    " position_ids that restart at each document"
                )
        neighbours = Neighbours(group, position_ids, x)
        masks: Masks = {}
        if self.has_keys:
            masks["full_attention"] = neighbours.mask(self.config, x)
        if self.has_local:
            masks |= dict.fromkeys(LOCAL, neighbours.local_rows())
        return neighbours, masks

    def _positions(
        self,
        attention_mask: torch.Tensor | Masks | None,
        start: int | torch.Tensor,
        time: int,
        device: torch.device,
    ) -> torch.Tensor:
        """Return default position ids (1 or B, T): column indices, or token indices with windows.

        Layers with a window do not cache padding, so the positions of neighbouring tokens must be
        consecutive.
        """
        if self.has_local and isinstance(attention_mask, torch.Tensor):
            real = attention_mask.long().cumsum(dim=1) - 1
            return real[:, real.shape[1] - time :].clamp(min=0)
        return torch.arange(time, device=device).unsqueeze(0) + start

    def _segments(
        self,
        attention_mask: torch.Tensor | Masks | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        batch: int,
        time: int,
    ) -> Segments:
        """Return the padding, or the documents packed by position ids; WHOLE_ROWS for neither.

        The mask is reduced only once, as this synchronises with the device. It is not reduced in a
        decode step of a stack without states.
        """
        prepared = isinstance(attention_mask, dict)  # by `generate`, before a compiled forward
        mask = attention_mask.get("linear_attention") if prepared else attention_mask
        custom = mask is not None and mask.ndim != 2
        may_pack = not prepared and position_ids is not None and is_empty(cache)
        if custom or not (may_pack or self.has_state):
            return WHOLE_ROWS
        segments = find_segments(mask, position_ids if may_pack else None, batch, time)
        if segments.packed and cache is not None:
            raise ValueError(
                "position_ids: expected one document per row with a cache, got packed documents (such as"
                " position_ids that restart); try one row per document, or no cache"
            )
        return segments

    def _masks(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | Masks | None,
        cache: Cache | None,
        position_ids: torch.Tensor,
    ) -> Masks:
        """Return masks by layer type: 4-dimensional for softmax, (B, T_past + T) for linear layers."""
        if isinstance(attention_mask, dict):  # prepared by generate for compiled decoding
            return attention_mask
        custom = attention_mask is not None and attention_mask.ndim == 4
        if custom and self.has_state:
            raise ValueError(
                "attention_mask: expected (B, T) with 0 at padding, as a 4-dimensional mask has no"
                " meaning for layers that carry a state, got 4 dimensions; try position_ids that restart"
                " at each document"
            )
        masks: Masks = {"linear_attention": attention_mask}
        if self.has_keys:
            past: dict[str, Any] = {CACHE: cache}
            masks["full_attention"] = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                layer_idx=self.first_key_layer,  # its length is that of the sequence
                **past,
            )
        return masks


def find_local_rows(
    x: torch.Tensor,
    mask: torch.Tensor | None,
    cache: Cache | None,
    segments: Segments,
) -> LocalRows:
    """Return the rows of x (B, T, D) for layers with bounded reach; mask (B, T_past + T)."""
    return LocalRows.find((len(x), x.shape[1]), x.device, past_length(cache), mask, segments)

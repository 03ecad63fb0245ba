"""Model: embeddings, a stack of layers from the layout, and a head. One implementation of all layouts.

Shapes: B batch, T time, D model dim, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.masking_utils import (
    create_causal_mask,
    create_recurrent_attention_mask,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hybrid.config.hybrid_config import HybridConfig
from hybrid.config.spec import LOCAL, StackSpec
from hybrid.modeling.backends import use_backends_of
from hybrid.modeling.cache import CachePast
from hybrid.modeling.context_parallel import ContextGroup, Neighbours
from hybrid.modeling.converters import get_converter
from hybrid.modeling.embeddings import build_embedding
from hybrid.modeling.layer import HybridLayer, Masks
from hybrid.modeling.mtp import MultiTokenPrediction
from hybrid.modeling.outputs import HybridOutput
from hybrid.modeling.pretrained import HybridPreTrainedModel
from hybrid.modeling.speculative import MTPDrafts
from hybrid.modeling.training_losses import Objective, own_losses, warn_of_skipped_losses
from hybrid.modeling.weight_sharing import tied_weights
from hybrid.nn.arguments import (
    ATTENTION_ARGUMENTS,
    CACHE,
    DOCUMENT_ARGUMENTS,
    IGNORED_ARGUMENTS,
    LOSS_ARGUMENTS,
    PAGED_ARGUMENTS,
    RECORDING_ARGUMENTS,
    check_arguments,
    pick_cache,
)
from hybrid.nn.cache import is_empty, is_paged, past_length
from hybrid.nn.input_checks import (
    check_cache,
    check_logits_to_keep,
    check_masks,
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
MODEL_ARGUMENTS = STACK_ARGUMENTS | LOSS_ARGUMENTS


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
            named = [
                name for name in ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k") if name in kwargs
            ]
            if named:
                raise ValueError(
                    f"{named[0]}: expected no such argument with context parallelism, got one; try"
                    " position_ids that restart at each document"
                )
            if attention_mask is not None or past is not None:
                raise ValueError(
                    "attention_mask, cache: expected None with context parallelism, got one of them; try"
                    " rows without padding, packed by position_ids"
                )
            neighbours = Neighbours(self.context_group, position_ids, x)
            segments, position_ids = neighbours.segments, neighbours.position_ids
            masks = {}
            if self.has_keys:
                masks["full_attention"] = neighbours.mask(self.config, x)
            if self.has_local:
                masks |= dict.fromkeys(LOCAL, neighbours.local_rows())
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


class HybridForCausalLM(Objective, HybridPreTrainedModel, GenerationMixin):
    """Hybrid language model: ids (B, T) -> logits (B, T, V)."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.model = HybridModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = MultiTokenPrediction(config, HybridModel) if config.num_mtp_layers else None
        self.install_recorders()
        self.post_init()

    def create_masks_for_generate(self, **kwargs: Any) -> Any:
        """Create the masks of one forward, before a compiled forward."""
        names = ("config", "inputs_embeds", "attention_mask", CACHE)
        arguments = {name: kwargs[name] for name in names}
        masks = {"linear_attention": create_recurrent_attention_mask(**arguments)}
        if self.model.has_keys:
            positions = kwargs.get("position_ids")
            masks["full_attention"] = create_causal_mask(
                **arguments, position_ids=positions, layer_idx=self.model.first_key_layer
            )
        if self.model.has_local:
            x, mask = kwargs["inputs_embeds"], kwargs["attention_mask"]
            one_each = mask is None or x.shape[1] == 1  # a single token is never padding
            segments = WHOLE_ROWS if one_each else find_segments(mask, None, *x.shape[:2])
            masks |= dict.fromkeys(LOCAL, find_local_rows(x, mask, kwargs[CACHE], segments))
        return masks

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Extend transformers' method: name the cache ``past_key_values``, as PEFT 0.21 expects."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if CACHE in inputs:
            inputs["past_key_values"] = inputs.pop(CACHE)
        return inputs

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Extend transformers' method: check that all layers fit its paged cache.

        The paged cache holds only the keys and values of plain softmax attention.

        Raises:
            ValueError: other mixers, canon layers, layers without mixer, or unequal head sizes.
        """
        mixers = self.config.stack.mixers
        unfit = [s for s, m in mixers.items() if not m.cls.fits_paged(m.options)]
        reason = None
        if unfit:
            reason = f"the mixers {', '.join(map(repr, unfit))}"
        elif any(layer.canon for layer in self.config.stack):
            reason = "canon layers"
        elif not all(layer.mixers for layer in self.config.stack):
            reason = "layers of a feed-forward alone (leave '-' and 'E' to the config's ffn)"
        if reason is not None:
            raise ValueError(
                f"continuous batching (generate_batch): expected plain softmax attention in every"
                f" layer, got {reason}, which the paged cache of transformers cannot hold; try"
                " generate() with a left-padded batch"
            )
        sizes = {mixer.options.sizes[1:] for mixer in mixers.values()}
        if len(sizes) > 1:
            raise ValueError(
                "continuous batching (generate_batch): expected the same num_kv_heads and head_dim in"
                f" every layer, got {sorted(sizes)}; try generate() with a left-padded batch"
            )
        return super().init_continuous_batching(*args, **kwargs)

    @classmethod
    def from_published(
        cls, source: str | Path | PreTrainedModel, **kwargs: Any
    ) -> HybridForCausalLM:
        """Load a published model in the equivalent layout; see ``hybrid.convert.from_published``."""
        return get_converter().read(source, **kwargs)

    def export_published(self, out: str | Path, family: str | None = None, **kwargs: Any) -> str:
        """Write this model as a checkpoint of a published family; see ``hybrid.convert.export``."""
        return get_converter().write(self, out, family, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        output_last_hidden_state: bool = False,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> HybridOutput:
        """Run ``HybridModel.forward`` and the head.

        Args:
            labels: (B, T) int64, -100 at positions that are not predicted. The logits at t - 1 predict
                label t.
            logits_to_keep: number of last tokens to compute logits for (0: all), or their indices.
            skip_logits: whether to return no logits. Default: True in training with labels, so that the
                loss does not need the logits of the whole batch (see ``hybrid.modeling.losses``).
            output_last_hidden_state: whether to return the input of the head, (B, T, D).
            kwargs: as in ``HybridModel.forward``; also ``num_items_in_batch`` and ``shift_labels`` of
                the loss, and ``label_smoothing`` e, 0 <= e < 1. Smoothed targets are 1 - e at the label
                plus e / V everywhere, in the main loss and in multi-token prediction.

        Returns:
            ``HybridOutput`` with the loss (scalar) if there are labels, and logits (B, T, V).
        """
        paged = is_paged(pick_cache(cache, past_key_values))
        known = MODEL_ARGUMENTS | PAGED_ARGUMENTS if paged else MODEL_ARGUMENTS
        check_arguments("HybridForCausalLM", HybridForCausalLM.forward, kwargs, known)
        check_logits_to_keep(logits_to_keep)
        loss_kwargs = {name: kwargs.pop(name) for name in LOSS_ARGUMENTS if name in kwargs}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=pick_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            losses_follow=labels is not None,
            **{**kwargs, **self.record()},
        )
        hidden = outputs.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if skip_logits is None:
            skip_logits = self.training and labels is not None
        skip_logits = skip_logits and not self.has_loss_of_its_own
        output = HybridOutput(
            logits=None if skip_logits else self.compute_logits(hidden[:, keep]),
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.get("router_logits")
            if kwargs.get("output_router_logits")
            else None,
            last_hidden_state=hidden if output_last_hidden_state else None,
        )
        if self.mtp is not None and inputs_embeds is None and self.training:
            inputs_embeds = self.model.embed_tokens(input_ids)
        if labels is not None:
            attention_mask, position_ids = name_documents(
                attention_mask, position_ids, kwargs, tuple(hidden.shape[:2])
            )
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids}
        self.add_losses(output, outputs, labels, inputs_embeds, inputs, **loss_kwargs)
        return output

    def _get_candidate_generator(self, **kwargs: Any) -> CandidateGenerator:
        """Extend transformers' method for ``use_mtp``; see ``hybrid.modeling.speculative``."""
        if kwargs["generation_config"].use_mtp:
            return MTPDrafts(self, kwargs["generation_config"])
        return super()._get_candidate_generator(**kwargs)

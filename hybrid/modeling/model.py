"""Language model: the stack of ``hybrid.modeling.stack``, and a head. One implementation of all layouts.

Shapes: B batch, T time, D model dim, V vocabulary.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.masking_utils import (
    create_causal_mask,
    create_recurrent_attention_mask,
)
from transformers.utils.generic import can_return_tuple

from hybrid.config.hybrid_config import HybridConfig
from hybrid.config.spec import FULL, LOCAL
from hybrid.mixers import Mixer
from hybrid.modeling.converters import get_converter
from hybrid.modeling.mtp import MultiTokenPrediction
from hybrid.modeling.outputs import HybridOutput
from hybrid.modeling.pretrained import HybridPreTrainedModel
from hybrid.modeling.speculative import MTPDrafts
from hybrid.modeling.stack import STACK_ARGUMENTS, HybridModel, find_local_rows
from hybrid.modeling.training_losses import Objective
from hybrid.nn.arguments import (
    CACHE,
    LOSS_ARGUMENTS,
    PAGED_ARGUMENTS,
    check_arguments,
    pick_cache,
)
from hybrid.nn.cache import is_paged
from hybrid.nn.input_checks import (
    check_logits_to_keep,
)
from hybrid.nn.packing import (
    WHOLE_ROWS,
    find_segments,
    name_documents,
)

MODEL_ARGUMENTS = STACK_ARGUMENTS | LOSS_ARGUMENTS


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

    def _get_static_cache_init_shape(self) -> tuple[Any, Any] | None:
        """Extend transformers' method: None where its one shape is not that of all keys and values.

        transformers then creates the keys and values of each layer on first use.
        """
        shape = super()._get_static_cache_init_shape()
        plain = {i for i, kind in enumerate(self.config.layer_types) if kind == FULL}
        held = {
            (spec.heads, spec.dim)
            for i, layer in enumerate(self.model.layers)
            if i in plain
            for mixer in layer.mixer.modules()
            if isinstance(mixer, Mixer)
            for spec in mixer.tokens().values()
        }
        return shape if held <= {shape} else None

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

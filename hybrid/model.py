"""The model: embeddings, a stack of layers from the layout, a head. One file for every layout.

Shapes: B batch, T time, D model dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import (
    create_causal_mask,
    create_masks_for_generate,
    create_recurrent_attention_mask,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MoeCausalLMOutputWithPast,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import (
    OutputRecorder,
    capture_outputs,
    maybe_install_capturing_hooks,
)

from hybrid import hub
from hybrid.cache import LayerCache, count_tokens, fill_unused, is_empty, past_length
from hybrid.config import HybridConfig
from hybrid.ffn import FeedForward, balance
from hybrid.ffn.moe import Experts, MixtureOfExperts
from hybrid.ffn.router import BiasedRouter, Router
from hybrid.layout import Layer
from hybrid.mixers import Mixer, ShortConvolution
from hybrid.mixers.softmax_attention import SoftmaxAttention
from hybrid.norms import build_norm
from hybrid.segments import WHOLE_ROWS, Segments, from_padding, from_positions

Masks = dict[str, torch.Tensor | None]


class ParallelMixers(nn.Module):
    """Mixers side by side on one input, outputs combined (Falcon-H1 2507.22448, Hymba 2411.13676)."""

    def __init__(self, mixers: list[Mixer], combine: str) -> None:
        super().__init__()
        self.branches = nn.ModuleList(mixers)
        self.combine = combine

    def forward(self, x: torch.Tensor, branch_kwargs: list[dict[str, Any]]) -> torch.Tensor:
        """(B, T, D) -> (B, T, D): the sum or the mean of the branches."""
        outputs = [
            branch(x, **kwargs)[0]
            for branch, kwargs in zip(self.branches, branch_kwargs, strict=True)
        ]
        total = torch.stack(outputs).sum(dim=0)
        return total / len(outputs) if self.combine == "mean" else total


class Residual(nn.Module):
    """Where the norms of one residual branch sit: x, f -> x + f(x) and its relatives.

    pre x + f(n(x)); post n(x + f(x)); reordered x + n(f(x)); sandwich x + m(f(n(x))).
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.position = config.norm_position

        def norm() -> nn.Module:
            return build_norm(config.norm, config.hidden_size, config.norm_eps)

        self.norm_in = norm() if self.position in ("pre", "sandwich") else None
        self.norm_out = norm() if self.position != "pre" else None

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """The input of the branch."""
        return x if self.norm_in is None else self.norm_in(x)

    def leave(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The residual stream after the branch gave y."""
        if self.norm_out is None:
            return x + y
        return self.norm_out(x + y) if self.position == "post" else x + self.norm_out(y)


class HybridLayer(GradientCheckpointingLayer):
    """One layer of the layout: mixer(s), a feed-forward, or both, each with its own residual."""

    def __init__(self, config: HybridConfig, layer: Layer, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.symbols = layer.mixers
        self.has_state = [config.uses_state(symbol) for symbol in layer.mixers]
        self.mixer = self._build_mixer(config)
        self.mixer_residual = Residual(config) if self.mixer is not None else None
        self.ffn: FeedForward | None = None
        if layer.ffn:
            cls, options = config.feed_forward(layer.ffn)
            self.ffn = cls(options, config, layer_idx)
        self.ffn_residual = Residual(config) if self.ffn is not None else None

    def _build_mixer(self, config: HybridConfig) -> Mixer | ParallelMixers | None:
        built = []
        for symbol in self.symbols:
            cls, options = config.mixer(symbol)
            built.append(cls(options, config, self.layer_idx))
        if len(built) > 1:
            return ParallelMixers(built, config.parallel_combine)
        return built[0] if built else None

    def forward(
        self,
        x: torch.Tensor,
        *,
        attention_mask: Masks,
        position_embeddings: dict[str, tuple[torch.Tensor, torch.Tensor]],
        segments: Segments = WHOLE_ROWS,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        if self.mixer is not None:
            branches = self.mixer.branches if len(self.symbols) > 1 else [self.mixer]
            calls = self._calls(
                branches, attention_mask, position_embeddings, segments, past_key_values, kwargs
            )
            h = self.mixer_residual.enter(x)
            y = self.mixer(h, calls) if len(calls) > 1 else self.mixer(h, **calls[0])[0]
            x = self.mixer_residual.leave(x, y)
        if self.ffn is not None:
            x = self.ffn_residual.leave(x, self.ffn(self.ffn_residual.enter(x)))
        return x

    def _calls(
        self,
        branches: Any,
        masks: Masks,
        position_embeddings: dict[str, tuple[torch.Tensor, torch.Tensor]],
        segments: Segments,
        cache: Cache | None,
        kwargs: dict[str, Any],
    ) -> list[dict[str, Any]]:
        """The keyword arguments of each mixer; those with a state count from 0."""
        calls, state_idx = [], 0
        for symbol, mixer, has_state in zip(self.symbols, branches, self.has_state, strict=True):
            slot = None if cache is None else LayerCache(cache, self.layer_idx, state_idx)
            calls.append(
                {
                    **kwargs,
                    "attention_mask": masks.get(mixer.layer_type),
                    "position_embeddings": position_embeddings.get(symbol),
                    "segments": segments,
                    "cache": slot,
                }
            )
            state_idx += has_state
        return calls


class _HasExperts:
    """`model._can_set_experts_implementation()`: whether its layout has experts; False of the class.

    transformers looks for its decorator in this file otherwise, and it is in `hybrid.ffn.moe`.
    """

    def __get__(self, model: HybridPreTrainedModel | None, cls: type) -> Callable[[], bool]:
        if model is None:
            return lambda: False
        symbols = {layer.ffn for layer in model.config.layers if layer.ffn}
        kinds = [model.config.feed_forward(symbol)[0] for symbol in symbols]
        return lambda: any(issubclass(kind, MixtureOfExperts) for kind in kinds)


class HybridPreTrainedModel(PreTrainedModel):
    """What every hybrid model shares: initialisation, saving, and what transformers may do with it."""

    config: HybridConfig
    config_class = HybridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HybridLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": HybridLayer,
        "attentions": OutputRecorder(SoftmaxAttention, index=1),
        "router_logits": OutputRecorder(Router, index=0),
        "router_indices": OutputRecorder(Router, index=2),
    }
    _can_set_experts_implementation = _HasExperts()  # type: ignore[assignment]

    def post_init(self) -> None:
        """As transformers', which is told of the one buffer that only some layouts have."""
        if any(isinstance(module, BiasedRouter) for module in self.modules()):
            self._keep_in_fp32_modules_strict = ["score_correction_bias"]
        super().post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise one module; transformers calls this for every one that no checkpoint filled."""
        super()._init_weights(module)  # zeros and ones for biases and norms, std for the rest
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            if self.config.init == "xavier" and module is not self.get_output_embeddings():
                init.xavier_normal_(module.weight)
            if self.config.init == "depth_scaled" and hasattr(module, "is_residual_projection"):
                scaled = std / max(1, self.config.num_residual_branches) ** 0.5
                init.normal_(module.weight, mean=0.0, std=scaled)
        elif isinstance(module, ShortConvolution):
            module.init_parameters()
        elif isinstance(module, (Mixer, FeedForward, Router, Experts)):
            module.init_parameters(std)

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As transformers', and two small files by which `trust_remote_code=True` finds this package."""
        push = kwargs.pop("push_to_hub", False)
        hub_options = {k: kwargs.pop(k) for k in hub.PUSH_OPTIONS if push and k in kwargs}
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            hub.add_loading_files(save_directory)
        if push and is_main_process:  # it saves anew, with the two files this time, and uploads
            self.push_to_hub(**{"repo_id": Path(save_directory).name, **hub_options})

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing: a checkpoint names this package, and carries no copy of its code."""


class HybridModel(HybridPreTrainedModel):
    """The stack without a head: ids (B, T) -> hidden states (B, T, D)."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            [HybridLayer(config, layer, i) for i, layer in enumerate(config.layers)]
        )
        self.rotary = self._build_rotary(config)
        self.counting_layer = config.counting_layer
        self.has_keys = self.counting_layer is None
        symbols = {symbol for layer in config.layers for symbol in layer.mixers}
        self.has_state = any(map(config.uses_state, symbols))
        self.norm = nn.Identity()
        if config.norm_position != "post":
            self.norm = build_norm(config.norm, config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @staticmethod
    def _build_rotary(config: HybridConfig) -> nn.ModuleDict:
        """One rotary embedding per symbol that has positions."""
        symbols = dict.fromkeys(s for layer in config.layers for s in layer.mixers)
        built = {}
        for symbol in symbols:
            cls, options = config.mixer(symbol)
            rotary = cls.rotary(options, config)
            if rotary is not None:
                built[symbol] = rotary
        return nn.ModuleDict(built)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the stack.

        Args:
            input_ids: (B, T) int64; or `inputs_embeds`: (B, T, D).
            attention_mask: (B, T_past + T) with 0 at padding, on any side; None for none.
            position_ids: (B, T). Without a mask and with an empty cache, a position that does not
                follow the one before it starts a new document, and documents do not see each other.
            past_key_values: a cache to continue from; `DynamicCache(config=model.config)` or None.
            use_cache: whether to return a cache.

        Raises:
            ValueError: both or neither of ids and embeddings; packed documents with a cache given;
                a custom 4-dimensional mask with layers that carry a state.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x: torch.Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, time = x.shape[:2]
        given_cache = past_key_values
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        segments = self._packed(attention_mask, position_ids, given_cache, batch)
        if segments is not WHOLE_ROWS:
            # a document boundary inside the cache has no meaning for the tokens that come next
            past_key_values, attention_mask = None, None
        if position_ids is None:
            start = past_length(past_key_values)
            position_ids = torch.arange(time, device=x.device).unsqueeze(0) + start
        masks = self._masks(x, attention_mask, past_key_values, position_ids)
        if segments is WHOLE_ROWS and self.has_state:
            segments = from_padding(masks.get("linear_attention"), time)
        positions = {s: rotary(x, position_ids) for s, rotary in self.rotary.items()}

        for layer in self.layers:
            x = layer(
                x,
                attention_mask=masks,
                position_embeddings=positions,
                segments=segments,
                past_key_values=past_key_values,
                position_ids=position_ids,
                **kwargs,
            )
        if past_key_values is not None:
            fill_unused(past_key_values)
            if self.counting_layer is not None:
                count_tokens(past_key_values, self.counting_layer, x)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(x), past_key_values=past_key_values
        )

    def _packed(
        self,
        attention_mask: torch.Tensor | dict | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        batch: int,
    ) -> Segments:
        """Documents packed into rows, by position ids that restart; WHOLE_ROWS where there are none."""
        if position_ids is None or not is_empty(cache):
            return WHOLE_ROWS
        # last, for it waits for the device: a decode step has returned by now
        if attention_mask is not None and (
            isinstance(attention_mask, dict) or attention_mask.ndim != 2 or not attention_mask.all()
        ):
            return WHOLE_ROWS
        segments = from_positions(position_ids, batch)
        if segments is not WHOLE_ROWS and cache is not None:
            raise ValueError(
                "packed documents (position_ids that restart) cannot fill a cache; run each document"
                " as a row of its own, or leave past_key_values out"
            )
        return segments

    def _masks(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | Masks | None,
        past_key_values: Cache | None,
        position_ids: torch.Tensor,
    ) -> Masks:
        """The masks by layer type: 4-dimensional for softmax layers, (B, T_past + T) for linear ones."""
        if isinstance(attention_mask, dict):  # generate makes them itself for compiled decoding
            return attention_mask
        custom = attention_mask is not None and attention_mask.ndim == 4
        if custom and self.has_state:
            raise ValueError(
                "a 4-dimensional attention mask has no meaning for layers that carry a state; give a"
                " 2-dimensional one with 0 at padding, or position_ids that restart at each document"
            )
        masks: Masks = {"linear_attention": attention_mask}
        if self.has_keys:
            masks["full_attention"] = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        return masks


class HybridForCausalLM(HybridPreTrainedModel, GenerationMixin):
    """A hybrid language model: ids (B, T) -> logits (B, T, V)."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.model = HybridModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.has_experts = bool(balance.routers(self.model))
        if self.has_experts:  # training records routers; compiled, it could not install the hooks
            maybe_install_capturing_hooks(self.model)
        self.post_init()

    def create_masks_for_generate(self, **kwargs: Any) -> Any:
        """The masks of one forward, made ahead of a compiled one; a stack without keys has one."""
        if self.model.has_keys:
            return create_masks_for_generate(**kwargs)
        names = ("config", "inputs_embeds", "attention_mask", "past_key_values")
        mask = create_recurrent_attention_mask(**{name: kwargs[name] for name in names})
        return {"linear_attention": mask}

    @classmethod
    def from_published(cls, source: str | PreTrainedModel, **kwargs: Any) -> HybridForCausalLM:
        """A published model's weights in the equal layout; see `hybrid.convert.from_published`."""
        from hybrid.convert import from_published

        return from_published(source, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | MoeCausalLMOutputWithPast:
        """As `HybridModel.forward`, and the head.

        A stack with a mixture of experts has two more outputs: `router_logits`, (B * T, E) of each
        router, under `output_router_logits=True`; and in training `aux_loss`, what its balance
        options add to the loss (see `hybrid.ffn.balance`).

        Args:
            labels: (B, T) int64, -100 where nothing is to be predicted; label t is compared with the
                logits at t - 1.
            logits_to_keep: compute logits only for the last so many tokens (0: all), or for these
                indices.
        """
        observed = self.has_experts and self.training and torch.is_grad_enabled()
        record = {"output_router_logits": True, "output_router_indices": True} if observed else {}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{**kwargs, **record},
        )
        hidden = outputs.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        found = {
            "logits": logits,
            "past_key_values": outputs.past_key_values,
            "hidden_states": outputs.hidden_states,
            "attentions": outputs.attentions,
        }
        if not self.has_experts:
            return CausalLMOutputWithPast(loss=loss, **found)
        aux_loss = self._observe(outputs, hidden, attention_mask) if observed else None
        if loss is not None and aux_loss is not None:
            targets = kwargs.get("shift_labels")
            targets = labels[:, 1:] if targets is None else targets
            share = balance.share_of_batch(targets, kwargs.get("num_items_in_batch"))
            loss = loss + share * aux_loss.to(loss.device)
        router_logits = outputs.router_logits if kwargs.get("output_router_logits") else None
        return MoeCausalLMOutputWithPast(
            loss=loss, aux_loss=aux_loss, router_logits=router_logits, **found
        )

    def _observe(
        self, outputs: Any, hidden: torch.Tensor, attention_mask: torch.Tensor | Masks | None
    ) -> torch.Tensor:
        """Count the load of the experts, and return the balance losses of all layers."""
        mask = hidden.new_ones(hidden.shape[:2])
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            mask = attention_mask[:, -hidden.shape[1] :]
        return balance.observe(self.model, outputs.router_logits, outputs.router_indices, mask)

"""Base class of hybrid models: initialisation, saving, and integration with transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging
from transformers.utils.output_capturing import OutputRecorder

from hybrid import hub
from hybrid.config.hybrid_config import HybridConfig
from hybrid.ffn.moe import MixtureOfExperts
from hybrid.ffn.router import BiasedRouter, Router
from hybrid.mixers.attention import SoftmaxMixer
from hybrid.modeling import initialization, parallel_plans
from hybrid.modeling.layer import HybridLayer

logger = logging.get_logger(__name__)


class _HasExperts:
    """``model._can_set_experts_implementation()``: whether the layout has experts; False on the class.

    transformers' own method searches this file for its decorator, which is in ``hybrid.ffn.moe``.
    """

    def __get__(self, model: HybridPreTrainedModel | None, cls: type) -> Callable[[], bool]:
        if model is None:
            return lambda: False
        parts = model.config.stack.feed_forwards.values()
        return lambda: any(issubclass(part.cls, MixtureOfExperts) for part in parts)


class HybridPreTrainedModel(PreTrainedModel):
    """Base class of hybrid models: initialisation, saving, and integration with transformers."""

    config: HybridConfig
    config_class = HybridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HybridLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values", "past"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": HybridLayer,
        "attentions": OutputRecorder(SoftmaxMixer, index=1),
        "router_logits": OutputRecorder(Router, index=0),
    }
    _can_set_experts_implementation = _HasExperts()  # type: ignore[assignment]
    _is_loading = False

    def post_init(self) -> None:
        """Extend transformers' method: keep the router bias in float32, if the layout has one."""
        if any(isinstance(module, BiasedRouter) for module in self.modules()):
            self._keep_in_fp32_modules_strict = ["score_correction_bias"]
        initialization.prepare(self)
        super().post_init()

    def init_parallel_plans(self) -> None:
        """Extend transformers' method: without layers to split, keep head and embeddings whole."""
        super().init_parallel_plans()
        if not self.config.base_model_tp_plan:
            self._tp_plan = {}

    @classmethod
    def prepare_distribute_model(cls, distributed_config: Any, **kwargs: Any) -> Any:
        """Extend transformers' method: require ``tp_size``, which versions before 5.19 do not derive."""
        enabled = getattr(distributed_config, "enable_expert_parallel", False)
        if enabled and distributed_config.tp_size is None:
            raise ValueError(
                "distributed_config: expected tp_size with enable_expert_parallel=True, got None; try"
                " DistributedConfig(tp_size=N, enable_expert_parallel=True) for N processes"
            )
        return super().prepare_distribute_model(distributed_config, **kwargs)

    @classmethod
    def maybe_distribute_model(
        cls, model: Any, distributed_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Extend transformers' method: rules can name a layer; see ``parallel_plans``."""
        distribute = super().maybe_distribute_model
        if not parallel_plans.is_split(distributed_config):
            return distribute(model, distributed_config, *args, **kwargs)
        with parallel_plans.applied_by_layer(model, distributed_config) as by_layer:
            model = distribute(model, by_layer, *args, **kwargs)
        model.config.distributed_config = distributed_config
        return model

    def gather_sharded_state_dict_for_save(
        self, model_to_save: Any, state_dict: Any, distributed_config: Any, **kwargs: Any
    ) -> Any:
        """Extend transformers' method: leave out tied parameters, which are copies once gathered."""
        if parallel_plans.is_split(distributed_config):
            state_dict = parallel_plans.without_tied(model_to_save, state_dict)
        return super().gather_sharded_state_dict_for_save(
            model_to_save, state_dict, distributed_config, **kwargs
        )

    def _get_static_cache_init_shape(self) -> Any:
        """Extend transformers' method: return None if heads are split; the first keys set the shapes."""
        split = (getattr(self, "_tp_size", None) or 1) > 1
        return None if split else super()._get_static_cache_init_shape()  # type: ignore[misc]

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Extend transformers' method: layers with shared weights stay tied if the head is untied."""
        tied = super().get_expanded_tied_weights_keys(all_submodels)
        own = vars(self).get("_tied_weights_keys", {})
        return tied if all_submodels else {**tied, **own}

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, **kwargs: Any
    ) -> None:
        """Extend transformers' method: never use reentrant checkpointing around a router.

        Reentrant checkpointing runs a layer without gradients. Recorded outputs, such as router logits
        for the balance losses, would then have no gradients.
        """
        function = gradient_checkpointing_func
        reentrant = getattr(function, "keywords", {}).get("use_reentrant", False)
        if enable and reentrant and any(isinstance(m, Router) for m in self.modules()):
            logger.warning_once(
                "use_reentrant=True loses the gradients of router losses; models with experts use"
                " use_reentrant=False for checkpointing"
            )
            function = functools.partial(function, use_reentrant=False)
        if function is not None:
            kwargs["gradient_checkpointing_func"] = function
        super()._set_gradient_checkpointing(enable=enable, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise one module; transformers calls this for modules missing in a checkpoint."""
        before = initialization.unset_tensors(module) if self._is_loading else {}
        super()._init_weights(module)  # zeros and ones for biases and norms, std for the rest
        is_head = module is self.get_output_embeddings()
        sizes = self.config.stack.sizes
        initialization.initialize(module, self.config, sizes, is_head=is_head)
        initialization.fill_untouched(module, before, self.config.initializer_range)

    def _initialize_weights(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Extend transformers' method: ``init_parameters`` can also set the tensors of children.

        transformers skips a module whose own tensors are all loaded. A mixer may still initialise the
        bias of a projection.
        """
        if initialization.has_say(module):
            self._init_weights(module)
            module._is_hf_initialized = True  # type: ignore[assignment]
        else:
            super()._initialize_weights(module, *args, **kwargs)

    def _initialize_missing_keys(self, *args: Any, **kwargs: Any) -> None:
        """Extend transformers' method: values set in constructors do not count for missing keys."""
        models = [m for m in self.modules() if isinstance(m, HybridPreTrainedModel)]
        for model in models:
            model._is_loading = True
        try:
            super()._initialize_missing_keys(*args, **kwargs)
        finally:
            for model in models:
                model._is_loading = False

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Extend transformers' method: write two files, so that ``trust_remote_code=True`` works."""
        push = kwargs.pop("push_to_hub", False)
        hub_options = {k: kwargs.pop(k) for k in hub.PUSH_OPTIONS if push and k in kwargs}
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        is_main_process = self.should_save_on_this_rank(is_main_process)
        if is_main_process:
            hub.add_loading_files(save_directory)
        if push and is_main_process:  # saves again, now with the two files, and uploads
            self.push_to_hub(**{"repo_id": Path(save_directory).name, **hub_options})

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing: a checkpoint refers to this package and does not contain a copy of its code."""

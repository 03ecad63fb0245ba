"""What every hybrid model shares: initialisation, saving, and what transformers may do with it."""

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
from hybrid.modeling import initialization, mup, parallel_plans
from hybrid.modeling.layer import HybridLayer

logger = logging.get_logger(__name__)


class _HasExperts:
    """`model._can_set_experts_implementation()`: whether its layout has experts; False of the class.

    transformers looks for its decorator in this file otherwise, and it is in `hybrid.ffn.moe`.
    """

    def __get__(self, model: HybridPreTrainedModel | None, cls: type) -> Callable[[], bool]:
        if model is None:
            return lambda: False
        parts = model.config.stack.feed_forwards.values()
        return lambda: any(issubclass(part.cls, MixtureOfExperts) for part in parts)


class HybridPreTrainedModel(PreTrainedModel):
    """What every hybrid model shares: initialisation, saving, and what transformers may do with it."""

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
        """As transformers', which is told of the one buffer that only some layouts have."""
        if any(isinstance(module, BiasedRouter) for module in self.modules()):
            self._keep_in_fp32_modules_strict = ["score_correction_bias"]
        mup.mark(self)
        super().post_init()

    def init_parallel_plans(self) -> None:
        """As transformers', but without layers to split, heads and embeddings are left whole, too."""
        super().init_parallel_plans()
        if not self.config.base_model_tp_plan:
            self._tp_plan = {}

    @classmethod
    def prepare_distribute_model(cls, distributed_config: Any, **kwargs: Any) -> Any:
        """As transformers', which before 5.19 does not derive a size for experts."""
        asked = getattr(distributed_config, "enable_expert_parallel", False)
        if asked and distributed_config.tp_size is None:
            raise ValueError(
                "distributed_config: expected tp_size with enable_expert_parallel=True, got None; try"
                " DistributedConfig(tp_size=N, enable_expert_parallel=True) for N processes"
            )
        return super().prepare_distribute_model(distributed_config, **kwargs)

    @classmethod
    def maybe_distribute_model(
        cls, model: Any, distributed_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """As transformers', by rules that may name a layer; see `hybrid.modeling.parallel_plans`."""
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
        """As transformers', less the tied parameters, which are tensors of their own once gathered."""
        if parallel_plans.is_split(distributed_config):
            state_dict = parallel_plans.without_tied(model_to_save, state_dict)
        return super().gather_sharded_state_dict_for_save(
            model_to_save, state_dict, distributed_config, **kwargs
        )

    def _get_static_cache_init_shape(self) -> Any:
        """As transformers'; None, for shapes taken from the first keys, where heads are split."""
        split = (getattr(self, "_tp_size", None) or 1) > 1
        return None if split else super()._get_static_cache_init_shape()  # type: ignore[misc]

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """As transformers', but a head of its own does not part layers that share their weights."""
        tied = super().get_expanded_tied_weights_keys(all_submodels)
        own = vars(self).get("_tied_weights_keys", {})
        return tied if all_submodels else {**tied, **own}

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, **kwargs: Any
    ) -> None:
        """As transformers', but never reentrant around a router.

        Reentrant checkpointing runs a layer without gradients, and what is recorded there, as the
        logits of routers for their losses, has none either.
        """
        function = gradient_checkpointing_func
        reentrant = getattr(function, "keywords", {}).get("use_reentrant", False)
        if enable and reentrant and any(isinstance(m, Router) for m in self.modules()):
            logger.warning_once(
                "use_reentrant=True loses the gradients of router losses; models with experts are"
                " checkpointed with use_reentrant=False"
            )
            function = functools.partial(function, use_reentrant=False)
        if function is not None:
            kwargs["gradient_checkpointing_func"] = function
        super()._set_gradient_checkpointing(enable=enable, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise one module; transformers calls this for every one that no checkpoint filled."""
        before = initialization.unset_tensors(module) if self._is_loading else {}
        super()._init_weights(module)  # zeros and ones for biases and norms, std for the rest
        is_head = module is self.get_output_embeddings()
        sizes = self.config.stack.sizes
        initialization.initialize(module, self.config, sizes, is_head=is_head)
        initialization.fill_untouched(module, before, self.config.initializer_range)

    def _initialize_weights(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        """As transformers', and a module of ours is asked for the tensors of its children, too.

        transformers passes over a module whose own tensors are all loaded; a mixer may have a say in
        how the bias of a projection begins.
        """
        if initialization.has_say(module):
            self._init_weights(module)
            module._is_hf_initialized = True  # type: ignore[assignment]
        else:
            super()._initialize_weights(module, *args, **kwargs)

    def _initialize_missing_keys(self, *args: Any, **kwargs: Any) -> None:
        """As transformers': what a checkpoint lacks has no value yet, whatever constructors set."""
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
        """As transformers', and two small files by which `trust_remote_code=True` finds this package."""
        push = kwargs.pop("push_to_hub", False)
        hub_options = {k: kwargs.pop(k) for k in hub.PUSH_OPTIONS if push and k in kwargs}
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        is_main_process = self.should_save_on_this_rank(is_main_process)
        if is_main_process:
            hub.add_loading_files(save_directory)
        if push and is_main_process:  # it saves anew, with the two files this time, and uploads
            self.push_to_hub(**{"repo_id": Path(save_directory).name, **hub_options})

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing: a checkpoint names this package, and carries no copy of its code."""

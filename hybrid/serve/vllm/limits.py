"""What vLLM is asked for and the plugin does not do: refused by name when a server starts."""
# pyright: reportMissingImports=false

from __future__ import annotations

from vllm.config import VllmConfig

from hybrid.config.hybrid_config import HybridConfig
from hybrid.serve.vllm.attention import PAGED


def check_server(vllm_config: VllmConfig) -> None:
    """Refuse what a server is started with.

    Raises:
        ValueError: quantization, pipeline, expert or context parallelism, LoRA, speculative decoding.
    """
    parallel = vllm_config.parallel_config
    asked = {
        "quantization": vllm_config.quant_config is not None,
        "pipeline_parallel_size > 1": parallel.pipeline_parallel_size > 1,
        "enable_expert_parallel": parallel.enable_expert_parallel,
        "decode_context_parallel_size > 1": parallel.decode_context_parallel_size > 1,
        "enable_lora": vllm_config.lora_config is not None,
        "speculative_config": vllm_config.speculative_config is not None,
    }
    for name, wanted in asked.items():
        if wanted:
            raise ValueError(
                f"{name}: not supported for hybrid models in vLLM; leave it out, or export the model as"
                " a published architecture where one fits (hybrid export)"
            )


def check_model(config: HybridConfig) -> None:
    """Refuse mixers that cannot run in vLLM.

    Raises:
        ValueError: a mixer that cannot continue several documents in one row, except where vLLM's
            attention does so.
    """
    for symbol, spec in config.stack.mixers.items():
        if not (spec.cls.continues_packed or issubclass(spec.cls, PAGED)):
            raise ValueError(
                f"mixers.{symbol}: {spec.cls.name} is not served by vLLM: it cannot continue several"
                " documents in one row; use generate()"
            )

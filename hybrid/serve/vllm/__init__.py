"""Any layout in vLLM: an entry point of `vllm.general_plugins`.

The stack is the package's own, module by module; vLLM holds the past. Keys and values are with its paged
attention (`attention`), states on its state pages (`states`), and a batch of vLLM is one row of
documents, one for each request.
"""


def register() -> None:
    """Tell vLLM of `HybridForCausalLM`; vLLM calls this in each of its processes."""
    from vllm import ModelRegistry  # pyright: ignore[reportMissingImports]

    from hybrid.serve.vllm.lengths import register_lengths

    ModelRegistry.register_model("HybridForCausalLM", "hybrid.serve.vllm.model:HybridForVllm")
    register_lengths()

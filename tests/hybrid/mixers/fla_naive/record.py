"""Record outputs of flash-linear-attention's plain PyTorch functions, on small inputs.

    python tests/hybrid/mixers/fla_naive/record.py [FILE]

writes FILE (default: `record.json` here) for `tests/hybrid/mixers/test_fla_naive.py`, which runs without
that package. It needs `fla-core` and `einops`; no GPU. Each function is loaded from its own file, since
the package itself cannot be imported without Triton. They compute in float32.
"""

import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path

import torch

B, T, H, K, V, N = 2, 5, 2, 3, 4, 2


def random(generator, *shape):
    """Normal numbers of three decimals, so that the record holds them exactly."""
    return torch.randn(shape, generator=generator).mul(1000).round() / 1000


def unit(x):
    """x at length 1 over the last dim, to three decimals."""
    return (x / x.norm(dim=-1, keepdim=True)).mul(1000).round() / 1000


def gated_delta_product(r):
    """Two steps per token, beta up to 2."""
    return "gated_delta_product", "naive_recurrent_gated_delta_product", {
        "q": unit(r(B, T, H, K)), "k": unit(r(B, T * N, H, K)), "v": r(B, T * N, H, V),
        "g": -r(B, T, H).abs(), "beta": r(B, T * N, H).abs().clamp(max=2),
        "scale": K**-0.5, "num_householder": N,
    }  # fmt: skip


def gated_slot_attention(r):
    """Three slots; what is written is 1 - exp(g)."""
    g = -r(B, T, H, N + 1).abs()
    return "gsa", "naive_recurrent_gsa", {
        "q": r(B, T, H, K), "k": r(B, T, H, K), "v": r(B, T, H, V), "s": 1 - g.exp(), "g": g,
        "scale": 1.0,
    }  # fmt: skip


def gated_delta_net2(r):
    """Gates of erasing and writing per channel."""
    return "gdn2", "naive_recurrent_gdn2", {
        "q": unit(r(B, T, H, K)), "k": unit(r(B, T, H, K)), "v": r(B, T, H, V),
        "g": -r(B, T, H, K).abs(), "b": r(B, T, H, K).abs(), "w": r(B, T, H, V).abs(),
    }  # fmt: skip


def erase_keys(r):
    """RWKV-7's recurrence: alpha reads the state before its decay; heads before time."""
    removal, rate = unit(r(B, H, T, K)), r(B, H, T, K).abs().clamp(max=1)
    return "generalized_delta_rule/dplr", "dplr_recurrence", {
        "q": r(B, H, T, K), "k": r(B, H, T, K), "v": r(B, H, T, V), "alpha": removal,
        "beta": -removal * rate, "gk": -r(B, H, T, K).abs().clamp(max=0.6),
    }  # fmt: skip


def forgetting_attention(r):
    """Two query heads share a key head."""
    return "forgetting_attn", "naive_forgetting_attn", {
        "q": r(B, T, 2 * H, K), "k": r(B, T, H, K), "v": r(B, T, H, K), "g": -r(B, T, 2 * H).abs(),
    }  # fmt: skip


CASES = (
    gated_delta_product, gated_slot_attention, gated_delta_net2, erase_keys, forgetting_attention,
)  # fmt: skip


def naive(folder, name):
    """The function of this name of `fla/ops/FOLDER/naive.py`."""
    files = importlib.metadata.files("fla-core") or ()
    path = next(f for f in files if str(f) == f"fla/ops/{folder}/naive.py").locate()
    spec = importlib.util.spec_from_file_location(f"naive_{folder.replace('/', '_')}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def record(case):
    """Inputs and output of one case."""
    generator = torch.Generator().manual_seed(0)
    folder, name, inputs = case(lambda *shape: random(generator, *shape))
    output = naive(folder, name)(**inputs)
    output = output[0] if isinstance(output, tuple) else output
    listed = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    return {"inputs": listed, "output": output.double().tolist()}


def rounded(value):
    """Floats as short as float32 allows."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.8g}") if isinstance(value, float) else value


def main(file):
    """Write the file."""
    found = {case.__name__: rounded(record(case)) for case in CASES}
    found = {"fla-core": importlib.metadata.version("fla-core"), **found}
    Path(file).write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("record.json"))

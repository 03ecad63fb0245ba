"""Record what flash-linear-attention's own classes say of themselves: keys, defaults, names, shapes.

    python tests/hybrid/convert/fla_formats/record.py [FOLDER]

writes one JSON file for each family into FOLDER (default: here), for `tests/hybrid/convert/test_fla.py`,
which runs without that package. It needs `flash-linear-attention`; no GPU, for nothing is computed.
"""

import importlib
import inspect
import json
import sys
import warnings
from pathlib import Path

import torch

SIZES = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 20}
SOFTMAX = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "rope_theta": 500.0}
WINDOW = {"layers": [0], "num_heads": 2, "window_size": 5}
BOTH = {**SIZES, "num_hidden_layers": 4, "attn": [SOFTMAX, WINDOW]}

CASES = {
    "gla": {
        "published": {**SIZES, "num_heads": 3},
        "wide": {**SIZES, "hidden_size": 288, "num_heads": 1, "expand_k": 0.03125},
        "ungated": {**SIZES, "num_heads": 3, "use_output_gate": False, "clamp_min": -0.02,
                    "feature_map": "relu", "hidden_ratio": 2, "intermediate_size": None},
        "hybrid": {**BOTH, "num_heads": 2, "use_short_conv": True, "tie_word_embeddings": True},
    },
    "retnet": {
        "published": {**SIZES, "num_heads": 3},
        "wide": {**SIZES, "hidden_size": 144, "num_heads": 1, "expand_k": 0.125},
        "hybrid": {**BOTH, "num_heads": 2, "elementwise_affine": False},
    },
    "delta_net": {
        "published": {**SIZES, "num_heads": 3},
        "switches": {**SIZES, "num_heads": 3, "expand_k": 0.5, "expand_v": 1.5, "use_gate": True,
                     "allow_neg_eigval": True, "use_short_conv": False},
        "hybrid": {**BOTH, "num_heads": 2},
    },
    "gated_deltanet": {
        "published": {**SIZES, "num_heads": 3, "head_dim": 6},
        "wide": {**SIZES, "num_heads": 1, "head_dim": 130},
        "switches": {**SIZES, "num_heads": 2, "num_v_heads": 4, "head_dim": 6, "expand_v": 1.5,
                     "use_gate": False, "allow_neg_eigval": True, "use_short_conv": False},
        "hybrid": {**BOTH, "num_heads": 2, "head_dim": 6},
    },
    "kda": {
        "published": {**SIZES, "num_heads": 3, "head_dim": 6},
        "switches": {**SIZES, "num_heads": 2, "num_v_heads": 4, "head_dim": 6, "expand_v": 1.5,
                     "safe_gate": True, "lower_bound": -3.0, "allow_neg_eigval": True,
                     "use_short_conv": False},
        "hybrid": {**BOTH, "num_heads": 2, "head_dim": 6},
    },
    "hgrn2": {
        "published": {**SIZES, "expand_ratio": 8, "num_hidden_layers": 3},
        "switches": {**SIZES, "expand_ratio": None, "num_heads": 4, "use_lower_bound": False,
                     "use_short_conv": True, "norm_eps": 1e-3},
        "hybrid": {**BOTH, "expand_ratio": 12},
    },
    "rwkv6": {
        "published": {**SIZES, "num_heads": 3, "proj_low_rank_dim": 5, "gate_low_rank_dim": 7},
        "switches": {**SIZES, "num_heads": 2, "expand_k": 1.0, "expand_v": 1.5, "norm_first": False,
                     "norm_eps": 1e-3, "intermediate_size": None, "hidden_ratio": None},
        "hybrid": {**BOTH, "num_heads": 2},
    },
    "transformer": {
        "published": {**SIZES, "num_heads": 4},
        "switches": {**SIZES, "num_heads": 6, "num_kv_heads": 2, "qkv_bias": True, "qk_norm": True,
                     "rope_theta": 500.0},
        "window": {**SIZES, "num_heads": 2, "window_size": 5, "qk_norm": True, "norm_eps": 1e-5},
    },
}  # fmt: skip


def classes(name):
    """Their config class and their model class."""
    models = importlib.import_module("fla.models")
    configs = vars(models).values()
    config = next(c for c in configs if getattr(c, "model_type", None) == name)
    return config, getattr(models, config.__name__.replace("Config", "ForCausalLM"))


def record(name):
    """What one family says of itself."""
    config_class, model_class = classes(name)
    parameters = inspect.signature(config_class.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    cases = {}
    for case, given in CASES[name].items():
        config = config_class(**given)
        tensors = model_class(config).state_dict()
        if config.tie_word_embeddings:
            del tensors["lm_head.weight"]  # save_pretrained does
        cases[case] = {
            "config": {key: getattr(config, key) for key in defaults},
            "tensors": {key: list(tensor.shape) for key, tensor in tensors.items()},
        }
    with torch.device("meta"):
        usual = model_class(config_class())
    return {
        "fla": importlib.import_module("fla").__version__,
        "architecture": model_class.__name__,
        "defaults": defaults,
        "parameters": sum(p.numel() for p in usual.parameters()),
        "cases": cases,
    }


def main(folder):
    """Write the files."""
    warnings.simplefilter("ignore")
    # the constructor of their softmax layer asks for a package that only its forward needs
    importlib.import_module("fla.layers.attn").flash_attn_func = object()
    for name in CASES:
        text = json.dumps(record(name), indent=1).replace("\n     ", " ").replace("\n    ]", "]")
        (Path(folder) / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)

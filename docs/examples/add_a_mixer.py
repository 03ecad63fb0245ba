"""A mixer in one file: a recurrence with a data-dependent decay, in a stack with softmax layers."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from hybrid import LinearMixer, MixerOptions, register_mixer
from hybrid.train import parse_config, run


@dataclass(frozen=True)
class MyMixerOptions(MixerOptions):
    """Options of ``my_mixer``: heads H, and the dim of a head's keys and values."""

    num_heads: int = 4
    head_dim: int = 16


@register_mixer("my_mixer")
class MyMixer(LinearMixer):
    """S_t = sigmoid(x_t w_h) S_{t-1} + k_t v_t^T."""

    Options = MyMixerOptions
    formula = "G_t = sigmoid(x w) 1^T 1"

    def __init__(self, options, sizes, layer_idx):
        super().__init__(options, sizes, layer_idx)
        self.build(options.num_heads, options.head_dim, options.head_dim, conv_size=4)
        self.decay_proj = nn.Linear(sizes.hidden_size, options.num_heads)

    def gates(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The log decay, (B, T, H)."""
        return {"log_decay": F.logsigmoid(self.decay_proj(x).float())}


# A letter of the layout, in a run on the standard library's source text. Frequencies of single
# bytes alone would leave a loss of 3.2 nats per byte.
config = parse_config(
    {
        "model": {"layout": "QQQS", "hidden_size": 64, "mixers": {"Q": {"type": "my_mixer"}}},
        "tokenizer": "bytes",
        "sequence_length": 128,
        "data": "stdlib",
        "training": {
            "output_dir": "runs/my_mixer",
            "max_steps": 60,
            "learning_rate": 3e-3,
            "logging_steps": 10,
        },
    }
)
result = run(config)
print("training loss:", result.losses)

model = AutoModelForCausalLM.from_pretrained("runs/my_mixer")
tokens = torch.arange(32)[None]
print(model.generate(tokens, max_new_tokens=8, do_sample=False)[0, 32:])

"""A mixer in one file: a recurrence whose decay depends on the token, in a stack beside softmax."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

import hybrid
from hybrid import LinearMixer, MixerOptions, register_mixer


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


config = hybrid.HybridConfig(
    layout="QQQS", hidden_size=64, vocab_size=256, mixers={"Q": {"type": "my_mixer"}}
)
model = hybrid.HybridForCausalLM(config)
tokens = torch.randint(0, 256, (1, 32))
model(input_ids=tokens, labels=tokens).loss.backward()
print("parameters:", sum(p.numel() for p in model.parameters()))
print(model.generate(tokens, max_new_tokens=8, do_sample=False)[0, 32:])

"""Import a published architecture, replace half of its softmax layers, distil it from the original.

A small random Llama replaces a downloaded checkpoint, so that the example needs no network; pass
``teacher.path`` and ``import_published`` the folder of a real one.
"""

from transformers import LlamaConfig, LlamaForCausalLM

import hybrid
from hybrid.distill import distill, parse_config
from hybrid.tokenizer import byte_tokenizer

tokenizer = byte_tokenizer()
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
llama = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=4, **sizes)
LlamaForCausalLM(llama).save_pretrained("teacher")
tokenizer.save_pretrained("teacher")

model = hybrid.HybridForCausalLM.from_published("teacher")
print("as published:", model.config.layout)

report = distill(
    parse_config(
        {
            "teacher": {"path": "teacher"},
            "layout": "SD",
            "data": "stdlib",
            "eval_data": {"source": "stdlib", "split": "heldout"},
            "eval_rows": 8,
            "sequence_length": 64,
            "output_dir": "runs/distilled",
            "outputs": {"training": {"max_steps": 10, "learning_rate": 1e-3}},
            "logits": {"training": {"max_steps": 10, "learning_rate": 3e-4}},
        }
    )
)
print("held-out losses:", report["losses"])

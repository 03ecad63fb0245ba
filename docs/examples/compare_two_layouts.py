"""Measure two layouts of one size on the same tasks, and write the report.

The models are untrained here; give ``evaluate`` the folders of trained ones.
"""

import torch

import hybrid
import hybrid_eval
from hybrid.tokenizer import byte_tokenizer

tokenizer = byte_tokenizer()
for layout in ("LLLS", "SSSS"):
    torch.manual_seed(0)
    config = hybrid.HybridConfig(layout=layout, hidden_size=64, vocab_size=len(tokenizer))
    hybrid.HybridForCausalLM(config).save_pretrained(layout)
    tokenizer.save_pretrained(layout)

result = hybrid_eval.evaluate(
    ["LLLS", "SSSS"],
    ["mqar", "heldout", "cost"],
    settings=hybrid_eval.Settings(lengths=(64,), limit=8, context=4096),
    options={"mqar": {"pairs": 4}},
)
for model in result["models"]:
    for task, measured in model["results"].items():
        print(model["name"], task, measured["metric"], measured[measured["metric"]])
print("report:", hybrid_eval.write_report(result, "report.html"))

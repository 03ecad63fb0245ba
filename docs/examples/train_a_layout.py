"""Train a layout on the standard library's sources, load it through transformers, continue a text."""

from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid.train import parse_config, run

config = parse_config(
    {
        "model": {"layout": "LLLS", "hidden_size": 64},
        "tokenizer": "bytes",
        "sequence_length": 128,
        "data": "stdlib",
        "training": {
            "output_dir": "runs/example",
            "max_steps": 20,
            "per_device_train_batch_size": 8,
            "learning_rate": 2e-3,
        },
    }
)
result = run(config)
print("training loss:", result.losses)

model = AutoModelForCausalLM.from_pretrained("runs/example")
tokenizer = AutoTokenizer.from_pretrained("runs/example")
prompt = tokenizer("def main(", return_tensors="pt")
tokens = model.generate(**prompt, max_new_tokens=16, do_sample=False)
print(tokenizer.decode(tokens[0]))

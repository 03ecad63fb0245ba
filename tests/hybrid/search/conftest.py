"""A model in which one softmax layer does all the mixing, and a search on it."""

import pytest
import torch

import hybrid
from hybrid.convert.replace_mixers import replace_mixers
from hybrid.tokenizer import byte_tokenizer
from search_cases import LAYERS, MATTERS

T = 32


def text():
    return "".join(f"{i}: {i * i % 97} squared is {i * i % 89}\n" for i in range(300))


@pytest.fixture(scope="session")
def searched_model(tmp_path_factory):
    """Five softmax layers of which only layer 3 has an output; all others add zero to the stream."""
    folder = tmp_path_factory.mktemp("searched") / "model"
    torch.manual_seed(0)
    config = hybrid.HybridConfig(
        layout=f"S{LAYERS}", hidden_size=32, vocab_size=259, initializer_range=0.3
    )
    model = hybrid.HybridForCausalLM(config)
    for i, layer in enumerate(model.model.layers):
        if i != MATTERS:
            torch.nn.init.zeros_(layer.mixer.o_proj.weight)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def pair(searched_model):
    """Teacher and all-linear student."""
    teacher = hybrid.HybridForCausalLM.from_pretrained(searched_model).requires_grad_(False).eval()
    return teacher, replace_mixers(teacher, "D5")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text())
    return str(path)


@pytest.fixture
def values(searched_model, text_file, tmp_path):
    """A search of seconds."""
    return {
        "name": "tiny",
        "distill": {
            "teacher": {"path": searched_model},
            "data": text_file,
            "eval_data": text_file,
            "sequence_length": T,
            "device": "cpu",
            "training": {
                "per_device_train_batch_size": 2,
                "max_steps": 4,
                "logging_steps": 1,
                "learning_rate": 1e-3,
                "save_steps": 2,
                "disable_tqdm": True,
            },
            "logits": {"training": {"max_steps": 1}},
        },
        "linear": "D",
        "budget": {"layers": 1},
        "rows": 3,
        "context": 256,
        "out": str(tmp_path / "out"),
    }

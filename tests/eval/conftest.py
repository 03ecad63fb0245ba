"""Models small enough to build in a test, and models that answer by rule."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


class RuleModel(torch.nn.Module):
    """A causal language model whose next token is computed by a function of the ids so far."""

    def __init__(self, rule, vocab_size=256, positions=None):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.rule = rule
        self.calls = 0
        self.config = SimpleNamespace(vocab_size=vocab_size, max_position_embeddings=positions)

    def forward(self, input_ids, logits_to_keep=0, use_cache=False):
        self.calls += 1
        positions = (
            range(input_ids.shape[1])
            if isinstance(logits_to_keep, int)
            else logits_to_keep.tolist()
        )
        logits = torch.zeros(len(input_ids), len(positions), self.config.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            for column, position in enumerate(positions):
                answer = self.rule(ids[: position + 1])
                if answer is not None:
                    logits[row, column, answer] = 20.0
        return SimpleNamespace(logits=logits)


def recall(ids):
    """What stood after the first earlier occurrence of the last token."""
    last = ids[-1]
    if last in ids[:-1]:
        return ids[ids.index(last) + 1]
    return None


@pytest.fixture
def rule_model():
    return RuleModel


@pytest.fixture
def recall_model():
    return RuleModel(recall)


@pytest.fixture
def tiny_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
        )
    )


@pytest.fixture
def lm_checkpoint(tmp_path, tiny_llama):
    """A checkpoint whose tokenizer is a Hugging Face one and reads bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    backend = Tokenizer(models.BPE(vocab={letters[i]: i for i in range(256)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    folder = tmp_path / "tiny"
    tiny_llama.config.max_position_embeddings = 1024
    tiny_llama.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=letters[0]).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def train():
    """Train a model on the first rows of a source; stops early where there is nothing to learn."""

    def run(model, source, *, steps, batch, rate, **options):
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, **options)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
        for step in range(steps):
            rows = [source[step * batch + i] for i in range(batch)]
            ids, labels = (
                torch.as_tensor(np.stack([row[key] for row in rows]))
                for key in ("input_ids", "labels")
            )
            loss = model(ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if loss.item() < 1e-3:
                break
        return model

    return run

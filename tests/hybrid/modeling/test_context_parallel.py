"""Slices of rows on two processes against whole rows on one."""

import json

import pytest

from hybrid.config.registry import mixers

# Every process runs the whole rows by itself, then its slice of them; gradients add up over processes.
DRIVER = """
import json, os, sys
import torch
import torch.distributed as dist
import hybrid
from hybrid.modeling.context_parallel import ContextGroup, Neighbours

original_mask = Neighbours.mask
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, size, T = dist.get_rank(), dist.get_world_size(), 20
messages = dist.new_group(list(range(size)))
generator = torch.Generator().manual_seed(1)
ids, labels = torch.randint(0, 61, (2, 2, T * size), generator=generator)
plain = torch.arange(T * size).expand(2, -1)
packed = plain.clone()
packed[0, 9:] -= 9
packed[0, T + 6 :] -= T - 3
packed[1, T:] -= T  # a document that begins where the slice does

def run(model, positions, part):
    model.zero_grad()
    logits = model(ids[:, part], position_ids=positions[:, part], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, part].flatten(), reduction="sum"
    )
    loss.backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}

def build(config):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "vocab_size": 61, "initializer_range": 0.3}
    model = hybrid.HybridForCausalLM(hybrid.HybridConfig(**{**sizes, **config})).double()
    return model.train() if config.get("use_cache") is False else model.eval()

found = []
for case in json.load(open(sys.argv[1])):
    model = build(case["config"])
    # a stack without keys never asks for the mask of a softmax layer
    Neighbours.mask = original_mask if case.get("mask", True) else None
    if case.get("checkpointing"):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": case["checkpointing"] == "reentrant"})
    for positions in (plain, packed) if case["packs"] else (plain,):
        model.model.context_group = None
        logits, gradients = run(model, positions, slice(None))
        model.model.context_group = ContextGroup(messages)
        part = slice(rank * T, (rank + 1) * T)
        mine, summed = run(model, positions, part)
        for value in summed.values():
            dist.all_reduce(value)
        scale = max(float(value.abs().max()) for value in gradients.values())
        found.append([
            case["name"],
            float((mine - logits[:, part]).abs().max() / logits.abs().max()),
            max(float((summed[n] - gradients[n]).abs().max()) for n in gradients) / scale,
        ])
json.dump(found, open(f"{sys.argv[1]}.{rank}", "w"))
dist.barrier()
os._exit(0)
"""


LAUNCHER = (
    *("torch.distributed.run", "--nproc-per-node", "2"),
    *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
)


@pytest.fixture
def by_slices(launch):
    """(name, error of the logits, error of the gradients) of each case, from both processes."""

    def run(cases):
        given = launch(LAUNCHER, DRIVER, cases)
        files = [given.with_name(f"{given.name}.{rank}") for rank in range(2)]
        return [entry for file in files for entry in json.loads(file.read_text())]

    return run


@pytest.mark.slow
def test_every_mixer_continues_what_the_process_before_has_seen(by_slices):
    cases = [
        {
            "name": f"{name}-{number}",
            "config": {
                "layout": "QQ",
                "mixers": {"Q": {"type": name, **options}},
                "feed_forwards": {"-": {"intermediate_size": 24}},
            },
            "packs": mixers.get(name).continues_packed,
        }
        for name in mixers.names()
        for number, options in enumerate(mixers.get(name).samples())
    ]
    found = by_slices(cases)
    assert len(found) == 2 * sum(1 + case["packs"] for case in cases)
    assert [entry for entry in found if not max(entry[1:]) < 1e-9] == []


@pytest.mark.slow
def test_whole_stacks_do_too(by_slices):
    """Mixers side by side, convolutions around them, checkpointing of both kinds; no softmax layer."""
    small = {"L": {"num_heads": 2}, "M": {"head_dim": 16}, "S": {"num_heads": 2}}
    stack = {"layout": "L[MS]LS", "mixers": small}
    cases = [
        {"name": "stack", "config": stack, "packs": True},
        {
            "name": "no keys",
            "config": {"layout": "LM", "mixers": small},
            "packs": True,
            "mask": False,
        },
        {"name": "canon", "config": {**stack, "canon": "ACD"}, "packs": True},
        {"name": "kept", "config": stack, "packs": True, "checkpointing": "reentrant"},
        {"name": "recomputed", "config": stack, "packs": True, "checkpointing": "other"},
    ]
    found = by_slices(cases)
    assert len(found) == 2 * 2 * len(cases)
    assert [entry for entry in found if not max(entry[1:]) < 1e-9] == []

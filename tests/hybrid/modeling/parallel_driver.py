"""Run by torchrun: models split over processes say what the whole model says.

    torchrun --nproc-per-node=2 parallel_driver.py CASES.json

CASES.json: a list of {"folder", "distributed", "split", "whole", "train"}: a checkpoint, keyword
arguments of `DistributedConfig` (or {"tp_plan": "auto"} of `from_pretrained`), modules that must be
split or whole, and whether gradients are compared.
"""

import json
import re
import sys
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from hybrid.ffn import balance
from hybrid.modeling.model import HybridForCausalLM


def close(actual, expected, what):
    """Equal to rounding in float64, or in float32."""
    tolerance = 1e-9 if expected.dtype == torch.float64 else 1e-4
    scale = float(expected.abs().max())
    torch.testing.assert_close(
        actual, expected, rtol=tolerance, atol=tolerance * scale, msg=lambda m: f"{what}: {m}"
    )


def whole(x):
    """A tensor of all processes."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def load(case, distributed):
    """The whole model, or the split one."""
    given = {}
    if distributed:
        options = case["distributed"]
        if options.pop("literally", False):
            given = options
        else:
            given = {"distributed_config": DistributedConfig(**options)}
    dtype = getattr(torch, case.get("dtype", "float64"))
    attention = case.get("attn_implementation", "sdpa")
    return HybridForCausalLM.from_pretrained(
        case["folder"], dtype=dtype, attn_implementation=attention, **given
    ).eval()


def check_placement(case, model):
    """Which modules are split."""
    parameters = model.named_parameters(remove_duplicate=False)
    placements = {n: p.placements for n, p in parameters if isinstance(p, DTensor)}
    split = {n for n, where in placements.items() if not all(p.is_replicate() for p in where)}
    for name in case["split"]:
        assert any(f"{n}.".startswith(f"{name}.") for n in split), (name, sorted(split))
    for name in case["whole"]:
        assert not any(f"{n}.".startswith(f"{name}.") for n in split), (name, sorted(split))


def check_step(model, expected, ids):
    """Losses and gradients of a training step, the second accumulated; and the load of experts."""
    for one in (model, expected):
        one.train()
        for rows in (ids, ids.flip(1)):
            one(rows, labels=rows).loss.backward()
    gradients = {n: p.grad for n, p in expected.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        close(whole(parameter.grad), gradients[name], f"gradient of {name}")
    loads = [{n: r.load for n, r in balance.routers(one).items()} for one in (model, expected)]
    for name, load_ in loads[1].items():
        assert torch.equal(loads[0][name], load_), name
    for one in (model, expected):
        one.eval().zero_grad()


def check_saved(case, model):
    """The checkpoint of the split model holds the tensors of the whole one."""
    folder = case["folder"] + "/saved"
    model.save_pretrained(folder)
    before, after = (load_file(f"{f}/model.safetensors") for f in (case["folder"], folder))
    assert before.keys() == after.keys(), before.keys() ^ after.keys()
    dtype = getattr(torch, case.get("dtype", "float64"))
    for name, tensor in before.items():
        kept = tensor if name.endswith("score_correction_bias") else tensor.to(dtype)
        assert torch.equal(kept, after[name]), name


def check(case):
    """All of a case."""
    expected, model = load(case, False), load(case, True)
    check_placement(case, model)
    torch.manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        close(model(ids).logits, expected(ids).logits, "logits")
        got, want = (m(ids, attention_mask=mask).logits for m in (model, expected))
        close(got[mask > 0], want[mask > 0], "logits with padding")
        options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
        for cache in (None, "static"):
            tokens = [
                m.generate(ids, cache_implementation=cache, **options) for m in (model, expected)
            ]
            assert torch.equal(*tokens), (cache, tokens)
    check_saved(case, model)
    if case.get("train", True):
        check_step(model, expected, ids)


def check_refused(case):
    """Loading raises ValueError with this text."""
    with pytest.raises(ValueError, match=re.escape(case["error"])):
        load(case, True)


def main():
    """Every case, and one line for each."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    with open(sys.argv[1]) as file:
        cases = json.load(file)
    failed = 0
    for case in cases:
        name = case["folder"].rpartition("/")[2]
        try:
            (check_refused if "error" in case else check)(case)
            print(f"passed {name}", flush=True)
        except Exception as error:
            failed += 1
            print(f"FAILED {name}: {type(error).__name__}: {str(error)[:600]}", flush=True)
        dist.barrier()
    dist.destroy_process_group()
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()

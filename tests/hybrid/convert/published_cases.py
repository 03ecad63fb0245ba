"""Small random models of published families in transformers' own classes, from `families/NAME.py`.

What is in those files is described in `families/test_families.py`.
"""

import importlib.util
import sys
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
import transformers

from hybrid.convert import FAMILIES

HERE = Path(__file__).parent / "families"


def load(path):
    spec = importlib.util.spec_from_file_location(f"family_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODULES = {
    path.stem: load(path) for path in sorted(HERE.glob("*.py")) if not path.stem.startswith("test_")
}


def random_published(name, case, **changes):
    """Their model of a case, with random weights and no end of sequence.

    Args:
        name: of the family.
        case: of `families/NAME.py`.
        changes: other values of the case's keys.
    """
    family = FAMILIES[name]
    torch.manual_seed(1)
    config = family.their_config({"vocab_size": 61, **MODULES[name].CASES[case], **changes})
    theirs = published_class(family.architecture)(config).eval()
    randomize(theirs)
    theirs.generation_config.eos_token_id = None
    return theirs


def too_old(name, case):
    """Why the installed transformers does not have a case: its class, or an argument that it needs."""
    architecture = FAMILIES[name].architecture
    if architecture not in dir(transformers):
        return f"transformers {transformers.__version__} has no {architecture}"
    needed = getattr(MODULES[name], "NEEDS", {}).get(case)
    if needed is None:
        return ""
    published_class(architecture)
    owner, argument = needed.rsplit(".", 1)
    if argument not in signature(resolve_name(f"transformers.models.{owner}")).parameters:
        return f"{owner} of transformers {transformers.__version__} has no {argument}"
    return ""


def published_class(name):
    """Their class on plain PyTorch: an installed kernel package would want a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        for package in ("fla", "mamba_ssm", "causal_conv1d"):
            patch.setitem(sys.modules, package, None)
        return getattr(transformers, name)


@torch.no_grad()
def randomize(model):
    """Weights that all matter: matrices of gain one half, vectors off their usual values.

    A gain of one makes small stacks so steep that float32 alone costs more than the tolerance; small
    embeddings do the same, for the norm after them divides by their size.
    """
    constants = {name for name, _ in model.named_buffers() if "bias" not in name}
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or name in constants:
            continue
        if "embed" in name:
            tensor.normal_()
        elif tensor.ndim >= 2 and "norm" not in name:
            tensor.normal_(std=0.5 * tensor.shape[-1] ** -0.5)
        else:
            tensor.add_(0.2 * torch.randn_like(tensor))

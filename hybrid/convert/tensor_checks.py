"""Check the tensors of a checkpoint against a plan."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch

from hybrid.convert.checkpoint import some
from hybrid.convert.family import Family
from hybrid.convert.mtp import MODULES
from hybrid.convert.tensor_plan import Step
from hybrid.convert.tensor_sources import TensorSource
from hybrid.modeling.model import HybridForCausalLM


def check_theirs(
    family: Family, planned: Sequence[Step], source: TensorSource, tied: bool
) -> list[str]:
    """Compare the tensors of a checkpoint with the planned ones, before any tensor is read.

    Returns:
        Names of tensors that neither their class nor ours reads.

    Raises:
        ValueError: missing or unexpected tensors, wrong shapes, or dtypes that are not
            floating-point.
    """
    wanted = {name for step in planned for name in step.theirs if step.is_read}
    missing = sorted(wanted - source.specs.keys())
    if missing:
        raise ValueError(f"the checkpoint has no {some(missing)}")
    for step in planned:
        known = step.constant is None and source.specs.keys() >= set(step.theirs)
        found = [source.specs[name].shape for name in step.theirs if known]
        if found and (misfit := step.misfit(found)):
            raise ValueError(misfit)
        for name in step.theirs if known else ():
            dtype = source.specs[name].dtype
            kind = str(dtype).removeprefix("torch.")
            if not dtype.is_floating_point:
                raise ValueError(f"{name}: expected a floating type, found {kind}")
            if dtype.itemsize < 2:
                raise ValueError(
                    f"{name}: {kind}, and the config has no quantization_config that says what it"
                    " stands for"
                )
    extra = source.specs.keys() - {name for step in planned for name in step.theirs}
    patterns = [*family.unread_weights, "*.rotary_emb.inv_freq"]
    patterns += ["lm_head.weight"] if tied else []
    unread = [n for n in sorted(extra) if any(fnmatchcase(n, pattern) for pattern in patterns)]
    left = sorted(extra - set(unread))
    if left:
        raise ValueError(
            f"the map of {family.name!r} has no place for {some(left)}; the checkpoint may be of a"
            " variant of that family"
        )
    return unread


def check_modules(
    family: Family, planned: Sequence[Step], source: TensorSource, depth: int
) -> None:
    """See that a checkpoint has all modules for multi-token prediction that are planned, and no
    more.

    Args:
        family: whose.
        planned: the steps of a model with those modules.
        source: the checkpoint.
        depth: layers of their main stack.

    Raises:
        ValueError: tensors of modules that are missing or left over, with how many there should be.
    """
    if family.mtp is None:
        return
    found = {name for name in source.specs if family.mtp.owns(name, depth)}
    wanted: dict[int, set[str]] = {}
    for step in planned:
        if step.is_read and step.ours[0].startswith(MODULES):
            module = int(step.ours[0].removeprefix(MODULES).partition(".")[0])
            wanted.setdefault(module, set()).update(step.theirs)
    lines = [
        f"module {module} lacks {some(sorted(names - found))}"
        for module, names in sorted(wanted.items())
        if names - found
    ]
    whole = len(wanted) - len(lines)
    left = found - {name for step in planned for name in step.theirs}
    lines += [f"left over: {some(sorted(left))}"] if left else []
    if wanted and lines:
        raise ValueError(
            f"{family.mtp.key} is {len(wanted)}, and of such modules the checkpoint has {whole} in"
            f" full; {'; '.join(lines)}; leave them out with mtp=False, --no-mtp on the command line"
        )


def check_ours(model: HybridForCausalLM, source: TensorSource) -> None:
    """Compare the tensors of a checkpoint of ours with its config.

    Raises:
        ValueError: missing or unexpected tensors, or wrong shapes.
    """
    tied = model.all_tied_weights_keys
    wanted = {n: tuple(t.shape) for n, t in model.state_dict().items() if n not in tied}
    missing = sorted(wanted.keys() - source.specs.keys())
    if missing:
        raise ValueError(f"the checkpoint has no {some(missing)}")
    for name, shape in wanted.items():
        if (found := source.specs[name].shape) != shape:
            raise ValueError(f"{name}: expected the shape {shape}, found {found}")
    left = sorted(source.specs.keys() - wanted.keys() - set(tied))
    if left:
        raise ValueError(f"the config has no place for {some(left)} of the checkpoint")


def check_copies(planned: Sequence[Step], source: TensorSource) -> None:
    """Check that tensors of theirs that must be copies are equal; reads two tensors at a time.

    Raises:
        ValueError: a copy differs; the message names it.
    """
    theirs = {ours: step.theirs[0] for step in planned if step.is_read for ours in step.ours}
    for step in planned:
        if step.copy_of is None or step.theirs[0] not in source.specs:
            continue
        copied, name = step.theirs[0], theirs[step.copy_of]
        if not torch.equal(source.read(copied), source.read(name)):
            raise ValueError(
                f"{copied}: not equal to {name}, and modules for multi-token prediction share it"
                " here; leave them out with mtp=False, --no-mtp on the command line"
            )

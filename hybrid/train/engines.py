"""Resume a checkpoint of one engine with another.

The files of a checkpoint depend on the engine that wrote it:

    plain     one process or DDP: model.safetensors, optimizer.pt with parameters by number
    full      FSDP2, full state dict: pytorch_model_fsdp.bin, optimizer.bin with parameters by name
    sharded   FSDP2, one part per process: pytorch_model_fsdp_0/, optimizer_0/
    deepspeed folders that only DeepSpeed reads

The first three hold the same tensors and resume each other, on any number of processes.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import load_fsdp_model, load_fsdp_optimizer
from accelerate.utils.constants import FSDP_MODEL_NAME
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers import AutoModelForCausalLM, Trainer
from transformers.core_model_loading import revert_weight_conversion

from hybrid.config.options import ConfigError, first_few
from hybrid.modeling.layer import HybridLayer

PLAIN, FULL, SHARDED, DEEPSPEED = "plain", "full", "sharded", "deepspeed"


def written_by(folder: Path) -> str:
    """Return the format of a complete checkpoint."""
    if any(folder.glob("global_step*")):
        return DEEPSPEED
    if (folder / f"{FSDP_MODEL_NAME}_0").is_dir():
        return SHARDED
    return FULL if (folder / f"{FSDP_MODEL_NAME}.bin").is_file() else PLAIN


def wanted_by(trainer: Trainer) -> str:
    """Return the format that the engine of a run reads by itself."""
    if trainer.is_deepspeed_enabled:
        return DEEPSPEED
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin is None:
        return PLAIN
    return FULL if "FULL" in str(plugin.state_dict_type) else SHARDED


def refuse_other_engine(folder: Path, trainer: Trainer) -> None:
    """Refuse to resume a DeepSpeed checkpoint with another engine, or another checkpoint with
    DeepSpeed.

    Raises:
        ConfigError: exactly one of the checkpoint and the run uses DeepSpeed.
    """
    found, wanted = written_by(folder), wanted_by(trainer)
    if DEEPSPEED in (found, wanted) and found != wanted:
        by, now = ("with", "without") if found == DEEPSPEED else ("without", "with")
        raise ConfigError(
            [
                f"expected a run {by} DeepSpeed, which wrote the checkpoint, got one {now}; try the"
                " earlier launcher, or a new run from its weights (model.path) in another"
                " training.output_dir"
            ],
            f"{folder} cannot be resumed",
        )


def load_model(trainer: Trainer, folder: Path, model: Any) -> bool:
    """Load weights that another engine wrote; return False if the engine's own loading works.

    The engine's own loading does not work for models that transformers saves under other weight
    names, even if the same engine wrote them. ``Trainer`` loads by the names in the model and
    ignores all others.

    Raises:
        ConfigError: the checkpoint lacks a weight of the model, or has a weight that the model
            lacks.
    """
    found, wanted = written_by(folder), wanted_by(trainer)
    whole: Any = trainer.accelerator.unwrap_model(model)
    if found == wanted and not (found == PLAIN and _renamed(whole)):
        return False
    _refuse_other_weights(folder, found, whole)
    if found == wanted:
        whole.load_state_dict(_weights(folder, whole), strict=False)  # not strict: tied weights
    elif found == PLAIN:
        first = trainer.args.process_index == 0
        weights: dict[str, Any] = dict(_weights(folder, whole)) if first else {}
        set_model_state_dict(model, weights, options=_from_first())
    elif (found, wanted) == (FULL, PLAIN):
        state = torch.load(folder / f"{FSDP_MODEL_NAME}.bin", "cpu", weights_only=True)
        set_model_state_dict(whole, state, options=StateDictOptions(full_state_dict=True))
    else:
        with _alone():
            load_fsdp_model(_plugin(found), trainer.accelerator, whole, str(folder))
    return True


def _refuse_other_weights(folder: Path, found: str, model: Any) -> None:
    """Check weight names: loading is not strict, because of tied weights, so torch would ignore
    missing ones.
    """
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    # tied weights are stored under one of their names
    there = {tied.get(name, name) for name in _names(folder, found)}
    names = _filed_names(model) if found == PLAIN else set(get_model_state_dict(model))
    own = {tied.get(name, name) for name in names}
    lines = [f"{name}: expected in the checkpoint, got none" for name in sorted(own - there)]
    lines += [f"{name}: expected none, got a weight" for name in sorted(there - own)]
    if lines:
        title = (
            f"{folder} cannot be resumed: its model differs (use the code and the versions that"
            " wrote it, or set another training.output_dir)"
        )
        raise ConfigError(first_few(lines), title)


def _filed_names(model: Any) -> set[str]:
    """Return the names of a model's weights in files of transformers, which stores experts one by
    one.
    """
    empty = {
        name: torch.empty(tensor.shape, device="meta")
        for name, tensor in get_model_state_dict(model).items()
    }
    return set(revert_weight_conversion(model, empty))


def _renamed(model: Any) -> bool:
    return _filed_names(model) != set(get_model_state_dict(model))


def _names(folder: Path, found: str) -> Iterable[str]:
    """Return the names of the weights in a checkpoint, without reading them."""
    if found == FULL:
        file = folder / f"{FSDP_MODEL_NAME}.bin"
        return torch.load(file, "cpu", weights_only=True, mmap=True).keys()
    if found == SHARDED:
        metadata = FileSystemReader(folder / f"{FSDP_MODEL_NAME}_0").read_metadata()
        return [name.removeprefix("model.") for name in metadata.state_dict_metadata]
    names: list[str] = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names += opened.keys()
    return names


def load_optimizer(trainer: Trainer, folder: Path) -> bool:
    """Load an optimizer state that another engine wrote; return False as in ``load_model``."""
    found, wanted = written_by(folder), wanted_by(trainer)
    if found == wanted:
        return False
    optimizer: Any = trainer.optimizer
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if found == PLAIN:
        state = torch.load(folder / "optimizer.pt", "cpu", weights_only=True)
        named = _by_name(state, optimizer, model) if trainer.args.process_index == 0 else {}
        set_optimizer_state_dict(model, optimizer, named, options=_from_first())
    elif (found, wanted) == (FULL, PLAIN):
        state = torch.load(folder / "optimizer.bin", "cpu", weights_only=True)
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(model, optimizer, state, options=options)
    else:
        with _alone():
            load_fsdp_optimizer(_plugin(found), trainer.accelerator, optimizer, model, str(folder))
    return True


class UntiedLayer(HybridLayer):
    """A layer without shared parameters, which can be a separate FSDP unit."""


def shard_ties_with_the_stack(trainer: Trainer) -> None:
    """Keep layers with tied parameters in FSDP's outermost unit: a unit must own its parameters.

    accelerate selects the layers that become units by their class.
    """
    layers = [m for m in _modules(trainer) if isinstance(m, HybridLayer)]
    uses = Counter(id(p) for layer in layers for p in layer.parameters())
    untied = [x for x in layers if all(uses[id(p)] == 1 for p in x.parameters())]
    if trainer.is_fsdp_enabled and len(untied) < len(layers):
        for layer in untied:
            layer.__class__ = UntiedLayer
        names = [UntiedLayer.__name__] if untied else []
        trainer.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = names


def _modules(trainer: Trainer) -> Iterable[nn.Module]:
    assert isinstance(trainer.model, nn.Module)
    return trainer.model.modules()


@contextmanager
def _alone() -> Iterator[None]:
    """Silence torch's warning when one process loads what several processes wrote.

    Here this is intended.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _plugin(kind: str) -> FullyShardedDataParallelPlugin:
    """Return a plugin that tells accelerate the format of the folder."""
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        state_dict_type="FULL_STATE_DICT" if kind == FULL else "SHARDED_STATE_DICT",
    )


def _from_first() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)


def _weights(folder: Path, model: Any) -> dict[str, torch.Tensor]:
    """Return the weights of a plain checkpoint by their names in the model."""
    if _renamed(model):
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def _by_name(state: dict[str, Any], optimizer: Any, model: nn.Module) -> dict[str, Any]:
    """Return an optimizer state with parameters by name instead of by number."""
    names = {id(p): name for name, p in model.named_parameters()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    return {
        "state": {order[number]: values for number, values in state["state"].items()},
        "param_groups": [
            {**group, "params": [order[number] for number in group["params"]]}
            for group in state["param_groups"]
        ],
    }

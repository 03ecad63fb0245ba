"""Checkpoints of one engine continued by another.

What a checkpoint holds depends on who wrote it:

    plain     one process or DDP: model.safetensors, optimizer.pt with parameters by number
    full      FSDP2, whole: pytorch_model_fsdp.bin, optimizer.bin with parameters by name
    sharded   FSDP2, a part from each process: pytorch_model_fsdp_0/, optimizer_0/
    deepspeed its own folders, which DeepSpeed alone reads

The first three hold the same and continue each other, on any number of processes.
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
    """What a whole checkpoint holds."""
    if any(folder.glob("global_step*")):
        return DEEPSPEED
    if (folder / f"{FSDP_MODEL_NAME}_0").is_dir():
        return SHARDED
    return FULL if (folder / f"{FSDP_MODEL_NAME}.bin").is_file() else PLAIN


def wanted_by(trainer: Trainer) -> str:
    """What the engine of a run reads by itself."""
    if trainer.is_deepspeed_enabled:
        return DEEPSPEED
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin is None:
        return PLAIN
    return FULL if "FULL" in str(plugin.state_dict_type) else SHARDED


def refuse_other_engine(folder: Path, trainer: Trainer) -> None:
    """DeepSpeed and the others do not continue each other.

    Raises:
        ConfigError: the checkpoint is one's and the run the other's.
    """
    found, wanted = written_by(folder), wanted_by(trainer)
    if DEEPSPEED in (found, wanted) and found != wanted:
        by, now = ("with", "without") if found == DEEPSPEED else ("without", "with")
        raise ConfigError(
            [
                f"it was written {by} DeepSpeed and this run is {now}; launch it as before, or start a"
                " new run from its weights (model.path) in another training.output_dir"
            ],
            f"{folder} cannot be continued: this launch",
        )


def load_model(trainer: Trainer, folder: Path, model: Any) -> bool:
    """Load weights that another engine wrote; False where the engine's own loading will do.

    It will not do for models whose weights transformers files under other names, not even where the
    same engine wrote them: `Trainer` loads by the names in the model, and leaves the rest as it is.

    Raises:
        ConfigError: the checkpoint lacks a weight of the model, or has one that the model has not.
    """
    found, wanted = written_by(folder), wanted_by(trainer)
    whole: Any = trainer.accelerator.unwrap_model(model)
    if found == wanted and not (found == PLAIN and _renamed(whole)):
        return False
    _refuse_other_weights(folder, found, whole)
    if found == wanted:
        whole.load_state_dict(_weights(folder, whole), strict=False)  # for the sake of ties
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
    """torch would leave what is missing as it is: loading is not strict, for the sake of ties."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    # tied weights are stored under one of their names
    there = {tied.get(name, name) for name in _names(folder, found)}
    names = _filed_names(model) if found == PLAIN else set(get_model_state_dict(model))
    own = {tied.get(name, name) for name in names}
    lines = [f"has no {name}" for name in sorted(own - there)]
    lines += [f"has {name}, which the model has not" for name in sorted(there - own)]
    if lines:
        title = (
            f"{folder} cannot be continued: its model was another (put the code or the versions that"
            " wrote it back, or set another training.output_dir); it"
        )
        raise ConfigError(first_few(lines), title)


def _filed_names(model: Any) -> set[str]:
    """Names of a model's weights in files of transformers, which has experts there one by one."""
    empty = {
        name: torch.empty(tensor.shape, device="meta")
        for name, tensor in get_model_state_dict(model).items()
    }
    return set(revert_weight_conversion(model, empty))


def _renamed(model: Any) -> bool:
    return _filed_names(model) != set(get_model_state_dict(model))


def _names(folder: Path, found: str) -> Iterable[str]:
    """Names of the weights in a checkpoint, without reading them."""
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
    """Load the optimizer's state that another engine wrote; False as in `load_model`."""
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
    """A layer that shares no parameter with another, which FSDP may shard by itself."""


def shard_ties_with_the_stack(trainer: Trainer) -> None:
    """Leave layers with tied parameters to FSDP's outermost unit: a unit must own its parameters.

    accelerate picks the layers that become units by their class.
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
    """Where one process loads what several wrote, torch warns that it takes that to be meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _plugin(kind: str) -> FullyShardedDataParallelPlugin:
    """Tells accelerate's loading what lies in the folder."""
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        state_dict_type="FULL_STATE_DICT" if kind == FULL else "SHARDED_STATE_DICT",
    )


def _from_first() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)


def _weights(folder: Path, model: Any) -> dict[str, torch.Tensor]:
    """Those of a plain checkpoint, by their names in the model."""
    if _renamed(model):
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def _by_name(state: dict[str, Any], optimizer: Any, model: nn.Module) -> dict[str, Any]:
    """An optimizer's state with parameters by name instead of by number."""
    names = {id(p): name for name, p in model.named_parameters()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    return {
        "state": {order[number]: values for number, values in state["state"].items()},
        "param_groups": [
            {**group, "params": [order[number] for number in group["params"]]}
            for group in state["param_groups"]
        ],
    }

"""A checkpoint of another's making runs no code of its own."""

import json
import os
import pickle
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp

from hybrid.config.options import ConfigError
from hybrid.train import parse_config, pickles, run
from hybrid.train.checkpoints import MANIFEST, damage, write_manifest
from hybrid.train.pickles import refuse_code


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path):
    """What hostile code leaves; nothing may."""
    yield tmp_path / "mark"
    assert not (tmp_path / "mark").exists()


@pytest.fixture
def saved(tmp_path):
    """Save a state the way FSDP2 does, and return its folder."""

    def save(folder, **values):
        model = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **values}
        with pytest.warns(UserWarning, match="torch.distributed"):
            dcp.save(state, checkpoint_id=folder)
        return folder

    return save


def edited(folder, change):
    index = folder / ".metadata"
    found = pickle.loads(index.read_bytes())
    change(found)
    index.write_bytes(pickle.dumps(found))


def test_what_torch_writes_is_read(saved, tmp_path):
    saved(tmp_path / "c" / "optimizer_0", note="text", numbers=[1, 2.5, None, (True,)])
    refuse_code(tmp_path / "c")


def test_an_index_that_runs_code_is_refused(saved, tmp_path, mark):
    folder = saved(tmp_path / "c" / "pytorch_model_fsdp_0")
    edited(folder, lambda found: setattr(found, "planner_data", Hostile(mark)))
    with pytest.raises(ConfigError, match=r"\.metadata: .*run code \(.*got .*mkdir"):
        refuse_code(tmp_path / "c")
    (folder / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ConfigError, match="expected Metadata, got dict"):
        refuse_code(tmp_path / "c")
    (folder / ".metadata").write_bytes(b"\x80")
    with pytest.raises(ConfigError, match="expected a checkpoint as torch writes it"):
        refuse_code(tmp_path / "c")


def test_a_value_that_runs_code_is_refused(saved, tmp_path, mark):
    saved(tmp_path / "c" / "optimizer_0", lr=Hostile(mark))
    with pytest.raises(ConfigError, match="expected a checkpoint as torch writes it"):
        refuse_code(tmp_path / "c")


def test_values_outside_the_folder_are_refused(saved, tmp_path):
    folder = saved(tmp_path / "c" / "optimizer_0", note="text")
    for path in folder.glob("*.distcp"):
        shutil.move(path, tmp_path / path.name)

    def elsewhere(found):
        for info in found.storage_data.values():
            object.__setattr__(info, "relative_path", f"../../{info.relative_path}")

    edited(folder, elsewhere)
    with pytest.raises(ConfigError, match=r"expected a file in the folder, got '\.\./\.\./"):
        refuse_code(tmp_path / "c")


def test_a_run_is_not_continued_by_a_hostile_folder(saved, tmp_path, mark, monkeypatch):
    """Its manifest fits it: whoever changes a file can write that anew."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = (json.dumps({"text": f"row {i} " * 5}) for i in range(20))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    values = {
        "model": {"layout": "S", "hidden_size": 16, "mixers": {"S": {"num_heads": 2}}},
        "data": str(tmp_path / "a.jsonl"),
        "sequence_length": 16,
        "training": {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 2,
            "save_steps": 1,
            "per_device_train_batch_size": 2,
            "disable_tqdm": True,
        },
    }
    run(parse_config(values))
    folder = tmp_path / "out" / "checkpoint-2"
    inside = saved(folder / "pytorch_model_fsdp_0")
    edited(inside, lambda found: setattr(found, "planner_data", Hostile(mark)))
    write_manifest(folder, json.loads((folder / MANIFEST).read_text())["run"])
    assert damage(folder) is None
    with pytest.raises(ConfigError, match="may run code"):
        run(parse_config(values))


def test_a_name_that_torch_no_longer_has_is_left_out(monkeypatch):
    monkeypatch.delattr(torch.serialization, "_get_layout")
    names = pickles._plain()
    assert names == {k: v for k, v in pickles._PLAIN.items() if k[1] != "_get_layout"}

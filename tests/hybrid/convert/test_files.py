"""Checkpoint folders in: what is read and how, what is refused, what stays behind; the command line."""

import errno
import json
import logging
import re
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hybrid
from hybrid.cli import main
from hybrid.convert import checkpoint as files
from hybrid.convert import export, import_published
from hybrid.convert.tensor_sources import Held, Respelt

SIZES: Any = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def qwen3(folder, **options):
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, **options))
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture
def theirs(tmp_path):
    return qwen3(tmp_path / "theirs")


def test_import_streams_into_a_checkpoint_that_loads(theirs, tmp_path):
    (theirs / "tokenizer.json").write_text("{}")
    config = import_published(theirs, tmp_path / "ours", max_shard_size="15KB")
    assert (config.layout, config.ffn) == ("S3", "-")
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    direct = hybrid.HybridForCausalLM.from_published(theirs)
    expected = direct.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
    assert loaded.generation_config.eos_token_id == 2
    assert (tmp_path / "ours" / "tokenizer.json").read_text() == "{}"
    assert export(tmp_path / "ours", tmp_path / "back", "qwen3") == "qwen3"
    with files.Checkpoint(theirs) as first, files.Checkpoint(tmp_path / "back") as second:
        assert first.specs == second.specs
        assert all(torch.equal(first.read(name), second.read(name)) for name in first.specs)
    assert (tmp_path / "back" / "tokenizer.json").is_file()


def test_only_one_step_is_held_at_a_time(theirs, tmp_path, monkeypatch):
    held, most = 0, 0
    plain = files.Checkpoint.read

    def read(self, name):
        nonlocal held
        tensor = plain(self, name)
        held += tensor.nbytes
        return tensor

    def write(folder, specs, tensors, size):
        nonlocal held, most
        for _, tensor in tensors():
            most, held = max(most, held), 0
            del tensor

    monkeypatch.setattr(files.Checkpoint, "read", read)
    monkeypatch.setattr("hybrid.convert.engine.write_weights", write)
    import_published(theirs, tmp_path / "ours")
    assert most == 61 * 24 * 4  # the embeddings


def test_dtypes_are_kept_each(theirs, tmp_path, rewrite):
    def change(tensors):
        for name in tensors:
            if "norm" not in name:
                tensors[name] = tensors[name].bfloat16()

    rewrite(theirs, change)
    ours = hybrid.HybridForCausalLM.from_published(theirs)
    assert ours.model.norm.weight.dtype == torch.float32
    assert ours.lm_head.weight.dtype == torch.bfloat16
    assert ours.config.dtype == torch.bfloat16
    ours.export_published(tmp_path / "back", "qwen3")
    with files.Checkpoint(theirs) as first, files.Checkpoint(tmp_path / "back") as second:
        assert first.specs == second.specs
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_dtype_is_changed_on_demand(theirs, dtype):
    ours = hybrid.HybridForCausalLM.from_published(theirs, dtype=dtype)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}


def test_wrong_dtype(theirs):
    with pytest.raises(ValueError, match="dtype: expected float32, bfloat16 or float16"):
        hybrid.HybridForCausalLM.from_published(theirs, dtype="int8")


def remove(part):
    def change(tensors):
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return change


def reshape(tensors):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:20].contiguous()


def count(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].long()


def halve(tensors):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


def fuse(tensors):
    tensors["model.layers.0.self_attn.qkv_proj.weight"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("layers.1.mlp.up"), r"the checkpoint has no model.layers.1.mlp.up_proj.weight"),
        (
            remove("k_norm"),
            r"has no model.layers.0.self_attn.k_norm.weight, model.layers.1.*2.self",
        ),
        (reshape, r"layers.1.mlp.up_proj.weight: expected the shape \(28, 24\), found \(20, 24\)"),
        (count, r"model.norm.weight: expected a floating type, found int64"),
        (halve, r"layers.1.mlp.up_proj.weight: float8_e4m3fn, and the config has no quantization_"),
        (fuse, r"map of 'qwen3' has no place for model.layers.0.self_attn.qkv_proj.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(theirs, tmp_path, change, message, rewrite):
    rewrite(theirs, change)
    with pytest.raises(ValueError, match=message):
        import_published(theirs, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_two_tensors_of_one_name_here_are_refused():
    found = Held({"model.language_model.a": torch.zeros(1), "model.a": torch.ones(1)})
    with pytest.raises(ValueError, match=r"language_model.a and model.a of the checkpoint are one"):
        Respelt(found, [("model.language_model.", "model.")])


def test_a_tensor_in_two_shards_is_refused_where_the_index_names_neither(theirs):
    first, second = sorted(theirs.glob("*.safetensors"))[:2]
    for path in (first, second):
        save_file(load_file(path) | {"extra": torch.zeros(3)}, path)
    message = f"extra is in {first} and in {second}, and {files.INDEX} does not say which is meant"
    with pytest.raises(ValueError, match=re.escape(message)):
        files.Checkpoint(theirs)


def twice(theirs, place, change):
    """Give a second shard a tensor of the first, or the other way round; its name and that shard."""
    index = json.loads((theirs / files.INDEX).read_text())["weight_map"]
    shards = sorted(theirs.glob("*.safetensors"))
    name = next(n for n, file in index.items() if file == shards[place].name)
    other = shards[-1 - place]
    tensor = load_file(shards[place])[name]
    save_file(load_file(other) | {name: change(tensor)}, other)
    return name, theirs / index[name], other


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize(
    "change",
    [lambda tensor: tensor + 1, lambda tensor: tensor[:1], lambda tensor: tensor.bfloat16()],
    ids=["values", "shape", "dtype"],
)
def test_a_tensor_that_two_shards_have_differently_is_refused(theirs, change, place):
    """transformers takes the last, others the one that the index names."""
    name, right, other = twice(theirs, place, change)
    message = f"{name} is in {right} and, with other values, in {other}; remove"
    with pytest.raises(ValueError, match=re.escape(message)):
        import_published(theirs, theirs.parent / "ours")


@pytest.mark.parametrize("place", [0, -1])
def test_a_tensor_that_two_shards_have_alike(theirs, caplog, place):
    right = hybrid.HybridForCausalLM.from_published(theirs).state_dict()
    name, first, other = twice(theirs, place, torch.clone)
    with caplog.at_level(logging.WARNING, "hybrid"):
        found = hybrid.HybridForCausalLM.from_published(theirs).state_dict()
    assert all(torch.equal(found[key], right[key]) for key in right)
    said = f"{name} of {other} left out: it is the same in {first}"
    assert [record.getMessage() for record in caplog.records] == [said]


def test_an_index_with_two_files_for_a_tensor_is_refused(theirs):
    text = (theirs / files.INDEX).read_text()
    name, shard = next(iter(json.loads(text)["weight_map"].items()))
    again = f'"weight_map": {{"{name}": "other.safetensors",'
    (theirs / files.INDEX).write_text(text.replace('"weight_map": {', again))
    message = f"{files.INDEX}: {name}: expected one value, got 'other.safetensors' and '{shard}'"
    with pytest.raises(ValueError, match=re.escape(message)):
        files.Checkpoint(theirs)


def test_one_file_beside_the_shards_of_an_index_is_refused(theirs):
    """transformers would take the one file, and others the index."""
    save_file({"other": torch.zeros(1)}, theirs / files.SINGLE)
    message = f"{files.SINGLE} is there, and {files.INDEX} names other files; remove"
    with pytest.raises(ValueError, match=message):
        files.Checkpoint(theirs)


def test_an_index_that_was_left_behind_is_no_hindrance(theirs, caplog):
    """As transformers leaves it where a model is saved again, then into one file."""
    index = (theirs / files.INDEX).read_bytes()
    transformers.Qwen3ForCausalLM.from_pretrained(theirs).save_pretrained(theirs)
    (theirs / files.INDEX).write_bytes(index)
    assert [path.name for path in theirs.glob("*.safetensors")] == [files.SINGLE]
    with files.Checkpoint(theirs) as found:
        assert found.specs.keys() == json.loads(index)["weight_map"].keys()
    assert "none of the files that it names is there" in caplog.text


def test_a_missing_shard_is_named(theirs, tmp_path):
    next(theirs.glob("model-00002-of-*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"1 of the \d files in .* are missing: model-00002-of"):
        import_published(theirs, tmp_path / "ours")


def test_a_shard_in_a_folder_of_its_own_is_checked_too(theirs):
    index = json.loads((theirs / files.INDEX).read_text())
    name, shard = next(iter(index["weight_map"].items()))
    (theirs / "deeper").mkdir()
    save_file({"other": torch.zeros(1)}, theirs / "deeper" / shard)
    index["weight_map"][name] = f"deeper/{shard}"
    (theirs / files.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"deeper/{shard}: {files.INDEX} promises {name}"):
        files.Checkpoint(theirs)


def test_a_shard_without_its_tensors_is_named(theirs):
    index = json.loads((theirs / files.INDEX).read_text())
    name, shard = next(iter(index["weight_map"].items()))
    save_file({"other": torch.zeros(1)}, theirs / shard)
    with pytest.raises(ValueError, match=rf"{shard}: {files.INDEX} promises {name}"):
        files.Checkpoint(theirs)


def test_a_damaged_file_is_named(theirs):
    path = next(theirs.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"{path.name}: no safetensors file, or a damaged one"):
        files.Checkpoint(theirs)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            files.SINGLE,
            "version https://git-lfs\nsize 9",
            "a pointer of Git LFS in place of the file",
        ),
        (
            files.INDEX,
            '{"weight_map": {"a": 1}}',
            "expected an object 'weight_map' of tensor names",
        ),
        (
            "model.gguf",
            "GGUF",
            "found model.gguf, which is read if given itself, as FOLDER/NAME.gguf",
        ),
        (
            "model-00001-of-00002.safetensors",
            "",
            "found model-00001-of-00002.safetensors, which an index has to list",
        ),
        ("pytorch_model.bin", "", "found pytorch_model.bin, and pickled weights are never loaded"),
        ("consolidated.00.txt", "", "no model.safetensors and .*; found consolidated.00.txt"),
    ],
)
def test_other_files_are_named(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        files.Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "[" * 100_000, r"config\.json: expected valid JSON"),
        ("config.json", "[]", r"config\.json: expected a JSON object, got list"),
        (files.INDEX, '{"a":' * 100_000, rf"{files.INDEX}: expected valid JSON"),
        (files.INDEX, "3", rf"{files.INDEX}: expected a JSON object, got int"),
        (
            "generation_config.json",
            '{"eos_token_id": 2',
            r"generation_config\.json: expected valid JSON",
        ),
        ("tokenizer.json", "", r"tokenizer\.json: expected valid JSON"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json: expected a JSON object"),
    ],
)
def test_damaged_json_is_named(theirs, tmp_path, file, text, message):
    (theirs / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        import_published(theirs, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"model_type": "llama", "num_attention_heads": 0},
            "LlamaConfig of transformers refuses this config: integer modulo by zero",
        ),
        ({"model_type": "llama", "layer_types": 3}, "LlamaConfig of .* refuses .*: .int. object"),
        (
            {"num_hidden_layers": 10**12},
            "num_hidden_layers: 1000000000000 layers; expected at most",
        ),
    ],
)
def test_a_config_of_impossible_values_is_named(theirs, tmp_path, values, message):
    path = theirs / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(ValueError, match=message):
        import_published(theirs, tmp_path / "ours")


def test_a_tensor_that_was_read_does_not_change_with_its_file(theirs):
    ours = hybrid.HybridForCausalLM.from_published(theirs)
    before = ours.lm_head.weight.clone()
    for path in theirs.glob("*.safetensors"):
        path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(ours.lm_head.weight, before)


def test_nothing_is_unpickled(theirs):
    for path in theirs.glob("*.safetensors*"):
        path.unlink()
    torch.save({}, theirs / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"found pytorch_model.bin, and pickled weights are never"):
        hybrid.HybridForCausalLM.from_published(theirs)


def test_a_failure_leaves_no_folder_behind(theirs, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("the disk is full")

    monkeypatch.setattr("hybrid.convert.engine.copy_companions", fail)
    with pytest.raises(OSError, match="full"):
        import_published(theirs, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("model.norm"), "the checkpoint has no model.norm.weight"),
        (fuse, "the config has no place for model.layers.0.self_attn.qkv_proj.weight of the check"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}),
         r"model.norm.weight: expected the shape \(24,\), found \(3,\)"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_of_ours_is_not_exported(change, message, tmp_path, rewrite):
    mixers = {"S": {"num_heads": 4, "num_kv_heads": 2}}
    config = hybrid.HybridConfig(layout="S", hidden_size=24, vocab_size=61, mixers=mixers)
    hybrid.HybridForCausalLM(config).save_pretrained(tmp_path / "ours")
    rewrite(tmp_path / "ours", change)
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "ours", tmp_path / "out", "llama")


def test_a_folder_that_cannot_be_made(theirs):
    (theirs / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/out: cannot be made: "):
        import_published(theirs, theirs / "file" / "out")


def test_an_empty_folder_stays_the_folder_it_was(theirs, tmp_path, monkeypatch):
    """It may be a mount point, a link, or where the shell stands."""
    (tmp_path / "volume").mkdir()
    (tmp_path / "link").symlink_to("volume")
    number = (tmp_path / "volume").stat().st_ino
    monkeypatch.chdir(tmp_path / "link")
    import_published(theirs, ".")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "volume").stat().st_ino == number
    assert not [path.name for path in (tmp_path / "volume").iterdir() if path.name.startswith(".")]
    AutoModelForCausalLM.from_pretrained(tmp_path / "volume")


def test_a_failure_leaves_an_empty_folder_empty(theirs, tmp_path):
    (tmp_path / "ours").mkdir()
    (theirs / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(ValueError, match="are missing"):
        import_published(theirs, tmp_path / "ours")
    assert [*(tmp_path / "ours").iterdir()] == []


def test_a_link_to_nowhere_is_not_written_to(theirs, tmp_path):
    (tmp_path / "ours").symlink_to("nowhere")
    with pytest.raises(ValueError, match="ours: exists already"):
        import_published(theirs, tmp_path / "ours")


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_full_disk_is_one_line(theirs, tmp_path, monkeypatch, capsys, command):
    assert main(["import", str(theirs), str(tmp_path / "ours")]) == 0
    source = theirs if command == "import" else tmp_path / "ours"

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hybrid.convert.checkpoint._write_header", full)
    out = tmp_path / "out"
    assert main([command, str(source), str(out)]) == 2
    said = capsys.readouterr().err
    assert f"hybrid {command}: {out}: not written: [Errno {errno.ENOSPC}] No space left" in said
    assert said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


def test_a_dtype_of_no_name_does_not_matter(theirs):
    """Every tensor says its own."""
    config = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(config | {"dtype": "float13"}))
    ours = hybrid.HybridForCausalLM.from_published(theirs)
    assert ours.config.dtype == torch.float32


def test_a_file_in_place_of_its_folder(theirs):
    with pytest.raises(ValueError, match=r"config.json: is a file; give the folder that it is in"):
        hybrid.HybridForCausalLM.from_published(theirs / "config.json")


def test_a_full_folder_is_not_written_into(theirs):
    with pytest.raises(ValueError, match="exists already"):
        import_published(theirs, theirs)
    assert (theirs / files.INDEX).is_file()


@pytest.mark.parametrize("size", ["0", "-1GB", "big", "5 parsec"])
def test_wrong_shard_size(size):
    with pytest.raises(ValueError, match="max_shard_size: expected bytes or a size such as 5GB"):
        files.parse_size(size)


def test_hub_names_fetch_no_code_and_no_pickles(theirs, monkeypatch):
    asked = {}

    def fetch(name, allow_patterns, **options):
        asked.update(options, name=name, patterns=allow_patterns)
        return str(theirs)

    monkeypatch.setattr("hybrid.convert.opening.snapshot_download", fetch)
    hybrid.HybridForCausalLM.from_published("someone/something", revision="main")
    assert (asked["name"], asked["revision"]) == ("someone/something", "main")
    assert not [p for p in asked["patterns"] if p.endswith((".py", ".bin", ".pt", "*"))]


@pytest.mark.parametrize("name", ["someone/something", "no/such/folder"])
def test_a_name_that_is_nowhere(name):
    with pytest.raises(ValueError, match=f"{name}: no such folder"):
        hybrid.HybridForCausalLM.from_published(name)


# Configs


def test_every_obstacle_of_an_import_is_named(tmp_path):
    folder = qwen3(tmp_path / "theirs", use_sliding_window=True, hidden_act="tanh")
    with pytest.raises(ValueError, match="this qwen3 cannot be a hybrid model") as caught:
        hybrid.HybridForCausalLM.from_published(folder)
    assert len(caught.value.obstacles) == 2
    assert "use_sliding_window: expected False, got True" in str(caught.value)
    assert "hidden_act: expected one of 'silu'" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": "big"}, "hidden_size"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
            "Qwen3Config of transformers refuses this config: .*'linear'.*factor",
        ),
        ({"model_type": "mamba2"}, "Mamba2Config of transformers refuses this config: .*layer_typ"),
    ],
)
def test_a_value_that_their_class_refuses(theirs, values, message):
    config = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(config | values))
    with pytest.raises(ValueError, match=message):
        hybrid.HybridForCausalLM.from_published(theirs)


def test_export_of_something_else(theirs, tmp_path):
    with pytest.raises(ValueError, match="no hybrid of ours, model_type is 'qwen3'"):
        export(theirs, tmp_path / "out", "qwen3")
    with pytest.raises(ValueError, match="no such folder"):
        export(tmp_path / "nowhere", tmp_path / "out", "qwen3")


# The command line


def test_command_line_there_and_back(theirs, tmp_path, capsys):
    ours, back = str(tmp_path / "ours"), str(tmp_path / "back")
    assert main(["import", str(theirs), ours, "--dtype", "bfloat16"]) == 0
    assert "layout S3" in capsys.readouterr().out
    assert main(["export", ours, back, "--as", "qwen3"]) == 0
    assert "qwen3" in capsys.readouterr().out
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "qwen3"


def test_command_line_errors_are_one_line(theirs, tmp_path, capsys):
    ours = str(tmp_path / "ours")
    assert main(["import", str(tmp_path / "nowhere"), ours]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["import", str(theirs), ours]) == 0
    assert main(["export", ours, str(tmp_path / "out")]) == 0
    assert "out: qwen3" in capsys.readouterr().out
    assert main(["export", ours, str(tmp_path / "other"), "--as", "lama"]) == 2
    assert "did you mean 'llama'" in capsys.readouterr().err
    assert main(["export", ours, str(tmp_path / "other"), "--as", "llama"]) == 2
    assert "mixers.S.qk_norm: 'head' here (layers 0-2)" in capsys.readouterr().err


def test_another_layout_on_the_command_line(theirs, tmp_path, capsys):
    assert main(["import", str(theirs), str(tmp_path / "ours"), "--layout", "SLS"]) == 0
    assert "layout SLS" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert loaded.config.layout == "SLS"


@pytest.mark.parametrize("imported_from", ["qwen3", None, "gemma2"])
def test_an_export_tries_each_family_once(theirs, tmp_path, monkeypatch, imported_from):
    from hybrid.convert import configs

    import_published(theirs, tmp_path / "ours")
    path = tmp_path / "ours" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"imported_from": imported_from}))
    tried = []
    to_ours = configs.to_ours
    monkeypatch.setattr(
        configs,
        "to_ours",
        lambda family, *args, **kw: (tried.append(family.name), to_ours(family, *args, **kw))[1],
    )
    assert export(tmp_path / "ours", tmp_path / "back") == "qwen3"
    assert len(tried) == len(set(tried))
    assert "qwen3" in tried

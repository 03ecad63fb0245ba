"""The engine of conversions: operations, files, errors, exports; families are in `families/`."""

import json
import re
import shutil
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hybrid
from hybrid.cli import main
from hybrid.convert import FAMILIES, export, fitting, get_family, import_published
from hybrid.convert import checkpoint as files
from hybrid.convert.steps import Held, Respelt
from hybrid.convert.weights import (
    Fuse,
    Place,
    Reorder,
    Reshape,
    Split,
    Squeeze,
    Stack,
    Transpose,
    Unsqueeze,
)

OPERATIONS = {
    # operation, shapes of theirs, shapes of ours
    "squeeze": (Squeeze(1), [(6, 1, 4)], [(6, 4)]),
    "unsqueeze": (Unsqueeze(0), [(6, 4)], [(1, 6, 4)]),
    "transpose": (Transpose(), [(6, 4), (3, 2)], [(4, 6), (2, 3)]),
    "reshape": (Reshape(lambda options: (2, 12)), [(2, 12)], [(6, 4)]),
    "split": (Split(), [(9, 4)], [(2, 4), (3, 4), (4, 4)]),
    "split_in_groups": (Split(groups=lambda options: 2), [(12, 4)], [(4, 4), (2, 4), (6, 4)]),
    "split_other_dim": (Split(dim=1), [(4, 9)], [(4, 2), (4, 7)]),
    "fuse": (Fuse(), [(3, 4), (3, 4)], [(6, 4)]),
    "fuse_sizes": (Fuse(lambda options: (2, 5)), [(2, 4), (5, 4)], [(7, 4)]),
    "reorder": (Reorder(lambda options: (2, 3, 4), (2, 0, 1)), [(9, 4)], [(9, 4)]),
    "stack": (Stack(), [(3, 4)] * 5, [(5, 3, 4)]),
    "stack_two": (Stack(2), [(3, 4)] * 10, [(5, 6, 4)]),
}  # fmt: skip
each_operation = pytest.mark.parametrize("name", OPERATIONS)


@each_operation
def test_operation_and_its_inverse(name):
    operation, theirs, ours = OPERATIONS[name]
    place = Place(None, tuple(ours))
    tensors = [torch.randn(shape) for shape in theirs]
    read = operation.read(tensors, place)
    assert [tuple(tensor.shape) for tensor in read] == ours
    back = operation.write(read, place)
    assert all(torch.equal(a, b) for a, b in zip(back, tensors, strict=True))


def test_groups_hold_a_share_of_each():
    fused = torch.arange(12)
    operation, _, _ = OPERATIONS["split_in_groups"]
    a, b, c = operation.read([fused], Place(None, ((4,), (2,), (6,))))
    assert (a.tolist(), b.tolist(), c.tolist()) == (
        [0, 1, 6, 7],
        [2, 8],
        [3, 4, 5, 9, 10, 11],
    )


def test_reorder_names_their_blocks():
    operation = Reorder(lambda options: (1, 2, 3), (2, 0, 1))
    read = operation.read([torch.tensor([0, 10, 11, 20, 21, 22])], Place(None, ((6,),)))
    assert read[0].tolist() == [20, 21, 22, 0, 10, 11]


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


def edit(folder, change):
    """Rewrite the tensors of a folder into one file, changed."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (folder / files.INDEX).unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, folder / files.SINGLE)


# Files


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


def test_dtypes_are_kept_each(theirs, tmp_path):
    def change(tensors):
        for name in tensors:
            if "norm" not in name:
                tensors[name] = tensors[name].bfloat16()

    edit(theirs, change)
    ours = hybrid.HybridForCausalLM.from_published(theirs)
    assert ours.model.norm.weight.dtype == torch.float32
    assert ours.lm_head.weight.dtype == torch.bfloat16
    assert ours.config.dtype == torch.bfloat16
    ours.export_published(tmp_path / "back", "qwen3")
    with files.Checkpoint(theirs) as first, files.Checkpoint(tmp_path / "back") as second:
        assert first.specs == second.specs
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


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
        (fuse, r"map of 'qwen3' has no place for model.layers.0.self_attn.qkv_proj.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(theirs, tmp_path, change, message):
    edit(theirs, change)
    with pytest.raises(ValueError, match=message):
        import_published(theirs, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_two_tensors_of_one_name_here_are_refused():
    found = Held({"model.language_model.a": torch.zeros(1), "model.a": torch.ones(1)})
    with pytest.raises(ValueError, match=r"language_model.a and model.a of the checkpoint are one"):
        Respelt(found, [("model.language_model.", "model.")])


def test_a_missing_shard_is_named(theirs, tmp_path):
    next(theirs.glob("model-00002-of-*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"1 of the \d files in .* are missing: model-00002-of"):
        import_published(theirs, tmp_path / "ours")


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
            "found model.gguf, which from_published reads if given as gguf_file",
        ),
        ("pytorch_model.bin", "", "found pytorch_model.bin, and pickled weights are never loaded"),
        ("consolidated.00.txt", "", "no model.safetensors and .*; found consolidated.00.txt"),
    ],
)
def test_other_files_are_named(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        files.Checkpoint(tmp_path)


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
def test_a_damaged_checkpoint_of_ours_is_not_exported(change, message, tmp_path):
    build("S").save_pretrained(tmp_path / "ours")
    edit(tmp_path / "ours", change)
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "ours", tmp_path / "out", "llama")


def test_a_folder_that_cannot_be_made(theirs):
    (theirs / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/out: cannot be made: "):
        import_published(theirs, theirs / "file" / "out")


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

    monkeypatch.setattr("hybrid.convert.engine.snapshot_download", fetch)
    hybrid.HybridForCausalLM.from_published("someone/something", revision="main")
    assert (asked["name"], asked["revision"]) == ("someone/something", "main")
    assert not [p for p in asked["patterns"] if p.endswith((".py", ".bin", ".pt", "*"))]


@pytest.mark.parametrize("name", ["someone/something", "no/such/folder"])
def test_a_name_that_is_nowhere(name):
    with pytest.raises(ValueError, match=f"{name}: no such folder"):
        hybrid.HybridForCausalLM.from_published(name)


# Configs


def test_unknown_family():
    with pytest.raises(ValueError, match="no map for the family 'quen3', did you mean 'qwen3'"):
        get_family("quen3")
    with pytest.raises(ValueError, match="for the family 'BambaForCausalLM', did you mean 'bamba'"):
        get_family("BambaForCausalLM")


def test_every_obstacle_of_an_import_is_named(tmp_path):
    folder = qwen3(tmp_path / "theirs", use_sliding_window=True, hidden_act="tanh")
    with pytest.raises(ValueError, match="this qwen3 cannot be expressed here") as caught:
        hybrid.HybridForCausalLM.from_published(folder)
    assert len(caught.value.obstacles) == 2
    assert "use_sliding_window: True cannot be expressed here" in str(caught.value)
    assert "hidden_act: 'tanh' cannot be expressed; these can: 'silu'" in str(caught.value)


def test_a_value_that_their_class_refuses(theirs):
    config = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(config | {"hidden_size": "big"}))
    with pytest.raises(ValueError, match="hidden_size"):
        hybrid.HybridForCausalLM.from_published(theirs)


def build(layout, **options):
    """A small model, its softmax and its dense feed-forward as Llama has them unless told."""
    mixers = {"S": {"num_heads": 4, "num_kv_heads": 2}, **options.pop("mixers", {})}
    config = hybrid.HybridConfig(
        **{"layout": layout, "hidden_size": 24, "vocab_size": 61, "mixers": mixers, **options}
    )
    torch.manual_seed(0)
    return hybrid.HybridForCausalLM(config).eval()


def logits_of(folder, architecture, ids):
    model, info = getattr(transformers, architecture).from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values())
    return model.eval()(ids).logits


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "layout", "options"),
    [
        # letters of one's own, bound to the family's mixers
        ("smollm3", "QQX", {"mixers": {
            "Q": {"type": "softmax_attention", "num_heads": 2},
            "X": {"type": "softmax_attention", "num_heads": 2, "rope_parameters": None}}}),
        # no positions in every so many, by an option or by a letter: both are SmolLM3
        ("smollm3", "S6", {"mixers": {"S": {"num_heads": 4, "nope_every": 3}}}),
        # feed-forwards as layers of their own
        ("bamba", "M-S-M-", {"mixers": {
            "M": {"head_dim": 8, "num_heads": 6, "state_size": 5},
            "S": {"num_heads": 2, "rope_parameters": {
                "rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}}}}),
        ("llama", "SS", {"tie_word_embeddings": False}),
        ("granitemoehybrid", "MS", {
            "mixers": {"M": {"head_dim": 8, "num_heads": 6, "state_size": 5}},
            "residuals": {"default": {"output_multiplier": 0.5}}, "logits_multiplier": 0.25}),
    ],
)  # fmt: skip
def test_a_model_of_ours_becomes_a_published_one(family, layout, options, tmp_path):
    ours = build(layout, **options)
    assert export(ours, tmp_path / "out", family) == family
    ids = torch.randint(3, 61, (2, 9))
    expected = logits_of(tmp_path / "out", get_family(family).architecture, ids)
    assert ((ours(ids).logits - expected).abs().max() / expected.std()) < 1e-5


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        ("SL", {}, r"layer 1 \(L\): lightning_attention has no place in llama, which has softmax"),
        ("SLLSL", {}, r"^layers 1-2, 4 \(L\): lightning_attention has no place in llama"),
        ("SS", {"mixers": {"S": {"num_heads": 4, "qk_norm": "head"}}},
         r"mixers.S.qk_norm: 'head' here \(layers 0-1\), llama can only say None"),
        ("S-SE", {}, r"layer 3: E \(mixture_of_experts\) here, llama can only have dense"),
        ("SQS", {"mixers": {"Q": {"type": "softmax_attention", "num_heads": 4, "num_kv_heads": 1}}},
         r"mixers.Q.num_kv_heads: 1 here \(layer 1\), llama can only say 2"),
        ("SS", {"norm": "layernorm"}, r"norm: 'layernorm' here, llama can only say 'rmsnorm'"),
        ("SS", {"norm_position": {"S": "sandwich", "-": "pre"}},
         r"norm_position.S: 'sandwich' here \(layers 0-1\), llama can only say 'pre'"),
        ("SS", {"feed_forwards": {"-": {"activation": "relu2"}}},
         r"feed_forwards.-.activation: 'relu2' cannot be expressed; these can: 'swiglu'"),
        ("SS", {"mixers": {"S": {"rope_parameters": {
            "rope_type": "default", "partial_rotary_factor": 0.5}}}},
         r"mixers.S.rope_parameters: .*0.5.* llama can only say"),
        ("SS", {"ffn": ""}, r"layers 0-1: no feed-forward here, llama can only have dense"),
    ],
)  # fmt: skip
def test_what_stands_in_the_way_is_named(layout, options, message, tmp_path):
    with pytest.raises(ValueError, match="this model cannot be written as llama") as caught:
        export(build(layout, **options), tmp_path / "out", "llama")
    (obstacle,) = caught.value.obstacles
    assert re.search(message, obstacle)
    assert not (tmp_path / "out").exists()


def test_without_a_name_the_one_family_that_fits_is_taken(tmp_path):
    mamba2 = {"head_dim": 8, "num_heads": 6, "state_size": 5}
    ours = build("MMS", mixers={"M": mamba2}, logits_multiplier=0.5)
    fit, refused = fitting(ours)
    assert fit == ["granitemoehybrid"]
    assert set(fit) | set(refused) == set(FAMILIES)
    assert ours.export_published(tmp_path / "out") == "granitemoehybrid"


@pytest.mark.parametrize(
    ("layout", "options", "family"),
    [
        ("S3", {}, "llama"),
        ("S3", {"mixers": {"S": {"num_heads": 4, "qk_norm": "head"}}}, "qwen3"),
        ("M3", {"ffn": "", "mixers": {"M": {"head_dim": 8, "num_heads": 6, "state_size": 5}}}, "mamba2"),
    ],
)  # fmt: skip
def test_without_a_name_the_family_with_nothing_else_is_taken(layout, options, family, tmp_path):
    ours = build(layout, **options)
    assert len(fitting(ours)[0]) > 1
    assert export(ours, tmp_path / "out") == family


def test_without_a_name_families_that_fit_are_named(tmp_path):
    ours = build("WW", mixers={"W": {"num_heads": 4, "window": 5}})
    fit, _ = fitting(ours)
    assert len(fit) > 1
    with pytest.raises(ValueError, match=f"fits the published architectures {', '.join(fit)}; cho"):
        export(ours, tmp_path / "out")


def test_without_a_name_and_a_family(tmp_path):
    with pytest.raises(ValueError, match="this model fits no published architecture") as caught:
        export(build("SFS"), tmp_path / "out")
    assert len(caught.value.obstacles) == 3


def test_the_nearest_families_have_the_mixers(tmp_path):
    options = {"S": {"num_heads": 2, "head_dim": 16}}
    with pytest.raises(ValueError, match="this model fits no published architecture") as caught:
        export(build("DDS", norm="layernorm", mixers=options), tmp_path / "out")
    nearest = [line.split(":")[0] for line in caught.value.obstacles]
    assert all("gated_delta_net" in get_family(name).letters.values() for name in nearest)
    shown = "\n".join(caught.value.obstacles)
    assert re.search(r"norm: 'layernorm' here, .* \(and \d+ more\)$", shown, re.MULTILINE)


def test_export_of_something_else(theirs, tmp_path):
    with pytest.raises(ValueError, match="no hybrid of ours, model_type is 'qwen3'"):
        export(theirs, tmp_path / "out", "qwen3")
    with pytest.raises(ValueError, match="no such folder"):
        export(tmp_path / "nowhere", tmp_path / "out", "qwen3")


# Families with files that their own save does not write


@torch.no_grad()
def test_olmo_hybrid_with_convolutions_of_unequal_widths(tmp_path):
    torch.manual_seed(0)
    sizes = SIZES | {"linear_key_head_dim": 6, "linear_value_head_dim": 12, "pad_token_id": 0}
    layers = ["linear_attention", "full_attention", "linear_attention"]
    config = transformers.OlmoHybridConfig(**sizes, layer_types=layers)
    theirs = transformers.OlmoHybridForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")

    def publish(tensors):
        """Keys and values as wide as they are, and the norms by their names in memory."""
        for name in [name for name in tensors if "q_conv1d" in name]:
            parts = [name.replace("q_conv1d", f"{part}_conv1d") for part in "qkv"]
            whole = torch.cat([tensors[part] for part in parts])
            cut = whole.split([24, 24, 48])
            tensors.update({p: c.contiguous() for p, c in zip(parts, cut, strict=True)})
        for name in [name for name in tensors if "attention_layer_norm" in name]:
            tensors[name.replace("attention_layer_norm", "input_layernorm")] = tensors.pop(name)

    shutil.copytree(tmp_path / "theirs", tmp_path / "published")
    edit(tmp_path / "published", publish)
    ids = torch.randint(3, 61, (2, 9))
    for folder in ("theirs", "published"):
        ours = hybrid.HybridForCausalLM.from_published(tmp_path / folder)
        expected = theirs(ids).logits
        assert ((ours(ids).logits - expected).abs().max() / expected.std()) < 1e-5
        export(ours, tmp_path / f"{folder}-back", "olmo_hybrid")
        found = logits_of(tmp_path / f"{folder}-back", "OlmoHybridForCausalLM", ids)
        assert torch.equal(found, expected)


@torch.no_grad()
def test_qwen3_5_inside_a_model_for_images(tmp_path):
    torch.manual_seed(0)
    sizes = SIZES | {"linear_key_head_dim": 6, "linear_value_head_dim": 8, "head_dim": 16,
                     "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                     "layer_types": ["linear_attention", "full_attention"] * 2,
                     "num_hidden_layers": 4}  # fmt: skip
    inner = transformers.Qwen3_5TextConfig(**sizes)
    theirs = transformers.Qwen3_5ForCausalLM(inner).eval()
    theirs.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    outer = {"model_type": "qwen3_5", "text_config": text, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(outer))

    def wrap(tensors):
        for name in [name for name in tensors if name.startswith("model.")]:
            tensors[name.replace("model.", "model.language_model.", 1)] = tensors.pop(name)
        tensors["model.visual.patch_embed.weight"] = torch.zeros(2)
        tensors["mtp.fc.weight"] = torch.zeros(2)

    edit(tmp_path, wrap)
    ours = hybrid.HybridForCausalLM.from_published(tmp_path)
    ids = torch.randint(3, 61, (2, 9))
    expected = theirs(ids).logits
    assert ((ours(ids).logits - expected).abs().max() / expected.std()) < 1e-5


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

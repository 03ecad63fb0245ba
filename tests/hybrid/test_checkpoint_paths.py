"""Checkpoints whose files leave their folder are refused by name; hub caches go on working."""

import json
import os
import shutil

import pytest
import torch
import transformers

import hybrid
import hybrid_eval.models
from hybrid import checkpoint_paths
from hybrid.cli import main
from hybrid.config.options import ConfigError
from hybrid.convert import checkpoint, export, import_published
from hybrid.tokenizer import load_tokenizer
from hybrid_eval import checkpoint_paths as eval_paths

SECRET = "TOP SECRET"


@pytest.fixture
def theirs(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(
        tmp_path / "theirs", max_shard_size="15KB"
    )
    (tmp_path / "private.txt").write_text(SECRET)
    return tmp_path / "theirs"


@pytest.fixture(params=[checkpoint_paths, eval_paths], ids=["hybrid", "eval"])
def check_folder(request):
    return request.param.check_folder


def name_shards(folder, rename):
    path = folder / checkpoint.INDEX
    index = json.loads(path.read_text())
    index["weight_map"] = {k: rename(name) for k, name in index["weight_map"].items()}
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("form", ["relative", "absolute", "back_and_forth", "windows"])
def test_an_index_that_leaves_the_folder(theirs, tmp_path, form, check_folder):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in theirs.glob("*.safetensors"):
        if form == "back_and_forth":
            shutil.copy(path, elsewhere)
        else:
            shutil.move(path, elsewhere)
    start = {
        "relative": "../elsewhere/",
        "absolute": f"{elsewhere}/",
        "back_and_forth": "../theirs/",
        "windows": "..\\elsewhere\\",
    }
    name_shards(theirs, lambda name: start[form] + name)
    for refused in (
        lambda: import_published(theirs, tmp_path / "ours"),
        lambda: hybrid.HybridForCausalLM.from_published(theirs),
        lambda: checkpoint.Checkpoint(theirs),
        lambda: check_folder(theirs),
        lambda: hybrid_eval.models.load(str(theirs)),
    ):
        with pytest.raises(
            ValueError, match=r"index\.json.*the checkpoint's folder, got .*leaves it"
        ):
            refused()
    assert main(["import", str(theirs), str(tmp_path / "ours")]) == 2
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("name", checkpoint.COMPANIONS)
def test_a_link_to_a_private_file_is_not_copied(theirs, tmp_path, name, check_folder):
    (theirs / name).unlink(missing_ok=True)
    os.symlink("../private.txt", theirs / name)
    for refused in (
        lambda: import_published(theirs, tmp_path / "ours"),
        lambda: checkpoint.copy_companions(theirs, tmp_path),
        lambda: check_folder(theirs),
    ):
        with pytest.raises(
            ValueError, match=rf"{name}: .*the checkpoint's folder, got .*leaves it"
        ):
            refused()
    assert not (tmp_path / "ours").exists()
    assert not (tmp_path / name).exists()


def test_a_linked_shard_and_a_linked_chat_template(theirs, tmp_path, check_folder):
    shard = sorted(theirs.glob("*.safetensors"))[0]
    shutil.move(shard, tmp_path / "w")
    os.symlink(tmp_path / "w", shard)
    for refused in (lambda: checkpoint.Checkpoint(theirs), lambda: check_folder(theirs)):
        with pytest.raises(
            ValueError, match=rf"{shard.name}: .*the checkpoint's folder, got .*leaves it"
        ):
            refused()
    shard.unlink()
    (theirs / "additional_chat_templates").mkdir()
    os.symlink(tmp_path / "private.txt", theirs / "additional_chat_templates" / "tool.jinja")
    with pytest.raises(ValueError, match=r"tool\.jinja.*the checkpoint's folder, got .*leaves it"):
        check_folder(theirs)


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("tokenizer_config.json", {"vocab_file": "../private.txt"}),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.4/../../private.txt"]}),
        ("config.json", {"auto_map": {"AutoConfig": "../code.Config"}}),
        ("config.json", {"auto_map": {"AutoTokenizer": ["/tmp/code.Tokenizer", None]}}),
    ],
)
def test_names_in_other_files(theirs, file, values, check_folder):
    path = theirs / file
    present = json.loads(path.read_text()) if path.exists() else {}
    (theirs / "tokenizer.4").mkdir()
    path.write_text(json.dumps(present | values))
    with pytest.raises(ValueError, match=rf"{file}: .*the checkpoint's folder, got .*leaves it"):
        check_folder(theirs)


def test_what_published_files_name_and_nobody_reads(theirs, check_folder):
    values = {
        "special_tokens_map_file": "/home/nobody/map.json",
        "vocab_file": None,
        "auto_map": {"AutoTokenizer": ["org/name--tokenization_x.XTokenizer", None]},
    }
    (theirs / "tokenizer_config.json").write_text(json.dumps(values))
    os.symlink("config.json", theirs / "config_again.json")
    check_folder(theirs)


def test_the_base_of_an_adapter(theirs, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(theirs)})
    )
    checkpoint_paths.check_folder(adapter)
    os.symlink(tmp_path / "private.txt", theirs / "tokenizer.json")
    with pytest.raises(ValueError, match=r"theirs/tokenizer\.json"):
        checkpoint_paths.check_folder(adapter)


def test_a_tokenizer(theirs, tmp_path):
    os.symlink(tmp_path / "private.txt", theirs / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"tokenizer\.json: .*a symbolic link to .*private"):
        load_tokenizer(str(theirs))


def hub_cache(theirs, cache):
    """The folder of a snapshot, linked as huggingface_hub does."""
    repository = cache / "models--org--name"
    snapshot = repository / "snapshots" / "0a1b"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(theirs.iterdir())):
        shutil.copy(path, repository / "blobs" / str(i))
        os.symlink(f"../../blobs/{i}", snapshot / path.name)
    return snapshot


def test_a_hub_cache(theirs, tmp_path, check_folder):
    (theirs / "tokenizer.json").write_text("{}")
    snapshot = hub_cache(theirs, tmp_path / "cache")
    os.symlink(tmp_path / "cache", tmp_path / "linked")
    for folder in (snapshot, tmp_path / "linked" / "models--org--name" / "snapshots" / "0a1b"):
        check_folder(folder)
    import_published(snapshot, tmp_path / "ours")
    assert (tmp_path / "ours" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "ours" / "tokenizer.json").is_symlink()
    export(tmp_path / "ours", tmp_path / "back", "llama")
    # the whole folder may be a link, which its user made
    os.symlink(snapshot, tmp_path / "current")
    import_published(tmp_path / "current", tmp_path / "again")


def test_a_hub_cache_with_a_link_that_leaves_the_repository(theirs, tmp_path, check_folder):
    snapshot = hub_cache(theirs, tmp_path / "cache")
    for target in ("../../../../private.txt", "../../../models--org--other/blobs/1"):
        (snapshot / "tokenizer.json").unlink(missing_ok=True)
        os.symlink(target, snapshot / "tokenizer.json")
        with pytest.raises(
            ValueError, match=r"tokenizer\.json: .*the checkpoint's folder, got .*leaves it"
        ):
            check_folder(snapshot)
    (snapshot / "tokenizer.json").unlink()
    name_shards(theirs, lambda name: f"../0a1b/{name}")
    (snapshot / checkpoint.INDEX).unlink()
    shutil.copy(theirs / checkpoint.INDEX, snapshot)
    with pytest.raises(ValueError, match=r"the checkpoint's folder, got '\.\./0a1b/.*leaves it"):
        checkpoint.Checkpoint(snapshot)


UNFINISHED = {
    "plan": ["plan", "{run}"],
    "export": ["export", "{run}", "{out}"],
    "parity": ["parity", "{run}", "--server", "vllm"],
    "import": ["import", "{run}", "{out}"],
    "eval": ["eval", "{run}", "--out", "{out}"],
}


@pytest.mark.parametrize("command", UNFINISHED)
def test_a_run_that_is_not_finished_is_named_with_its_newest_checkpoint(tmp_path, capsys, command):
    run = tmp_path / "run"
    for step in (9, 38, 40):
        (run / f"checkpoint-{step}").mkdir(parents=True)
        if step != 40:  # being written
            (run / f"checkpoint-{step}" / "config.json").write_text("{}")
    words = [word.format(run=run, out=tmp_path / "out") for word in UNFINISHED[command]]
    assert main(words) == 2
    line = f"{run}: not finished; try {run / 'checkpoint-38'}, or run the training again"
    assert line in capsys.readouterr().err


def test_of_several_checkpoints_the_newest_complete_one_is_named(tmp_path):
    for step in (9, 38):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "config.json").write_text("{}")
    assert checkpoint_paths.newest_checkpoint(tmp_path).name == "checkpoint-38"
    (tmp_path / "checkpoint-9" / "manifest.json").write_text("{}")
    assert checkpoint_paths.newest_checkpoint(tmp_path).name == "checkpoint-9"
    (tmp_path / "config.json").write_text("{}")
    assert checkpoint_paths.newest_checkpoint(tmp_path) is None

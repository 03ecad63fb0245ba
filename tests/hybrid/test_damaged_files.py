"""Files of a checkpoint, damaged in many ways: each command ends with one line that names the file."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hybrid.checkpoint_paths import check_weights
from hybrid.cli import main
from hybrid.tokenizer import byte_tokenizer
from hybrid.train.__main__ import main as train

# transformers closes none of the files that it refuses
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def rewrite(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


def replace_by(make):
    def change(path):
        path.unlink()
        make(path)

    return change


NOT_JSON = {
    "empty": rewrite(lambda _: b""),
    "truncated": rewrite(lambda text: text[: len(text) // 2]),
    "binary": rewrite(lambda _: bytes(range(256))),
    "UTF-16": rewrite(lambda text: text.decode().encode("utf-16")),
    "deep": rewrite(lambda _: b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
}
NO_OBJECT = {
    name: rewrite(lambda _, text=text: text)
    for name, text in {
        "list": b"[]",
        "number": b"3",
        "NaN": b"NaN",
        "null": b"null",
        "text": b'"x"',
    }.items()
}
NO_FILE = {
    "folder": replace_by(lambda path: path.mkdir()),
    "dangling link": replace_by(lambda path: path.symlink_to(path.parent / "nowhere")),
    "circle of links": replace_by(lambda path: path.symlink_to(path)),
}
TWICE = {"a key twice": rewrite(lambda text: b'{"x": 1, "x": 2, ' + text.lstrip()[1:])}
DAMAGES = {**NOT_JSON, **NO_OBJECT, **NO_FILE, **TWICE}
FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors.index.json",
]


@pytest.fixture
def ours(build, tmp_path):
    model = build(layout="LS", vocab_size=259, dtype=torch.float32)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
@pytest.mark.parametrize("file", FILES)
def test_a_file_that_holds_no_object_is_named(ours, file, damage):
    assert check_weights(str(ours)) == str(ours)
    damage(ours / file)
    with pytest.raises(ValueError, match=file) as found:
        check_weights(str(ours))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("value", [b"{}", b'{"weight_map": 3}', b'{"weight_map": null}'])
def test_an_index_without_a_list_of_tensors_is_named(ours, value):
    (ours / "model.safetensors.index.json").write_bytes(value)
    with pytest.raises(ValueError, match=r"index\.json: weight_map: expected an object"):
        check_weights(str(ours))


@pytest.mark.parametrize("name", ["empty", "truncated", "binary", "list", "folder"])
def test_a_file_of_weights_that_is_not_complete_is_named(ours, name):
    path = sorted(ours.glob("*.safetensors"))[2]
    DAMAGES[name](path)
    with pytest.raises(ValueError, match=f"{path.name}: not a complete safetensors file"):
        check_weights(str(ours))


def train_from(folder, tmp_path):
    config = tmp_path / "train.yaml"
    config.write_text(
        f"model: {{path: {folder}}}\ndata: stdlib\ntokenizer: bytes\nsequence_length: 32\n"
        f"training: {{output_dir: {tmp_path / 'run'}, max_steps: 1}}\n"
    )
    return train([str(config)])


def distill_from(folder, tmp_path):
    config = tmp_path / "distill.yaml"
    config.write_text(
        f"teacher: {{path: {folder}}}\nlayout: SL\nsequence_length: 32\ndata: stdlib\n"
        "eval_data: {source: stdlib, split: heldout}\nlanguage: {training: {max_steps: 1}}\n"
        f"output_dir: {tmp_path / 'run'}\n"
    )
    return main(["distill", str(config)])


COMMANDS = {
    "generate": lambda folder, _: main(["generate", str(folder), "a", "--max-new-tokens", "1"]),
    "plan": lambda folder, _: main(["plan", str(folder)]),
    "export": lambda folder, out: main(["export", str(folder), str(out / "out")]),
    "import": lambda folder, out: main(["import", str(folder), str(out / "out")]),
    "parity": lambda folder, _: main(["parity", str(folder), "--server", "vllm"]),
    "eval": lambda folder, _: main(["eval", str(folder), "--tasks", "needle"]),
    "train": train_from,
    "distill": distill_from,
}


@pytest.mark.parametrize("name", ["list", "number", "empty", "UTF-16", "deep", "dangling link"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_a_damaged_config(command, name, ours, tmp_path, capfd):
    folder = ours
    if command == "import":
        folder = tmp_path / "theirs"
        sizes = {"hidden_size": 32, "num_attention_heads": 2, "vocab_size": 259}
        config = LlamaConfig(intermediate_size=48, num_hidden_layers=1, **sizes)
        LlamaForCausalLM(config).save_pretrained(folder)
    capfd.readouterr()
    DAMAGES[name](folder / "config.json")
    assert COMMANDS[command](folder, tmp_path) != 0
    lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert "config.json" in lines[0]
    assert not (tmp_path / "out").exists()

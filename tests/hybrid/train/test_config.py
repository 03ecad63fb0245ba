import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from transformers import TrainingArguments

from hybrid import HybridConfig, HybridForCausalLM
from hybrid.config.options import ConfigError
from hybrid.config.yaml import apply_overrides, parse
from hybrid.tokenizer import byte_tokenizer
from hybrid.train import load_config, parse_config
from hybrid.train.build import make_folder, training_arguments
from hybrid.train.limits import DECIDED, USUAL_NAMES
from hybrid.train.model import load_model, model_config

RECIPES = Path(__file__).parents[3] / "configs" / "train"
GOOD = """
model: {layout: LS, hidden_size: 32}
data:
  - {source: stdlib, weight: 0.5}
  - {source: texts/*.jsonl, text_key: body, weight: 1}
sequence_length: 64
muon: true
training: {max_steps: 10, learning_rate: 1e-3}
"""


def mistakes(text):
    with pytest.raises(ConfigError) as caught:
        parse_config(yaml.safe_load(text) if isinstance(text, str) else text)
    return caught.value.mistakes


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(GOOD)
    return file


def test_a_config_is_typed_and_comes_back_from_its_own_text(path):
    config = load_config(path)
    assert config.training["learning_rate"] == 1e-3
    assert config.training["output_dir"] == "runs/small"
    assert config.packing == "concatenate"
    assert config.data[1].text_key == "body"
    assert config.muon.momentum == 0.95
    again = parse_config(yaml.safe_load(yaml.safe_dump(config.as_dict())))
    assert again == config


def test_overrides_reach_any_key(path):
    config = load_config(
        path,
        [
            "training.max_steps=3",
            "model.layout=SSSS",
            "data[1].weight=2e-1",
            "data.0.split=heldout",
            "packing=false",
            "model.mixers.S={num_heads: 2}",
        ],
    )
    assert config.training["max_steps"] == 3
    assert config.model["layout"] == "SSSS"
    assert (config.data[1].weight, config.data[0].split) == (0.2, "heldout")
    assert config.packing == "none"
    assert config.model["mixers"] == {"S": {"num_heads": 2}}


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("max_steps", "'max_steps': expected key=value; try training.max_steps=10"),
        ("data[7].weight=1", "data[7].weight: no entry '7' in a list of 2"),
        (
            "sequence_length.x=1",
            "sequence_length.x: expected a mapping at sequence_length, got 64",
        ),
    ],
)
def test_an_override_that_leads_nowhere(override, line):
    with pytest.raises(ConfigError) as caught:
        apply_overrides(yaml.safe_load(GOOD), [override])
    assert caught.value.mistakes == [line]


def test_every_mistake_is_named_at_once():
    found = mistakes("""
model: {layout: LQS, hiden_size: 64}
data:
  - {source: stdlib, wieght: 1}
  - {source: stdlib, weight: -1, split: test}
  - {weight: 1}
sequence_lenght: 64
packing: bestfit
muon: {nesterov: 3}
training: {max_stpes: 10, learning_rate: fast}
""")
    (layout,) = [line for line in found if line.startswith("model.layout")]
    found.remove(layout)
    assert "'Q'" in layout
    assert sorted(found) == [
        "data[0].wieght: unknown key, did you mean 'weight'?",
        "data[1].split: expected a split of stdlib, got 'test', known: heldout, train",
        "data[1].weight: expected above 0, got -1",
        "data[2].source: expected a value, got none",
        "model.hiden_size: unknown key, did you mean 'hidden_size'?",
        "muon.nesterov: expected bool, got int 3",
        "packing: expected one of 'concatenate', 'best_fit' or 'none', got 'bestfit'; try 'best_fit'",
        "sequence_lenght: unknown key, did you mean 'sequence_length'?",
        "sequence_length: expected a value, got none",
        "training.learning_rate: expected float, got str 'fast'",
        "training.max_stpes: unknown key, did you mean 'max_steps'?",
    ]


def test_values_that_cannot_be_meant(tmp_path):
    assert mistakes("{model: {}, data: [], sequence_length: 1}") == [
        "data: expected at least 1 entry, got []",
        "sequence_length: expected at least 2, got 1",
    ]
    assert mistakes("{model: {path: no/where}, data: stdlib, sequence_length: 8}") == [
        "model.path: expected an existing folder, got 'no/where'"
    ]


OUTSIDE = {
    "per_device_train_batch_size": (0, "at least 1"),
    "gradient_accumulation_steps": (0, "at least 1"),
    "max_steps": (-3, "at least 1, or -1 for num_train_epochs"),
    "num_train_epochs": (-1.0, "above 0"),
    "save_steps": (0, "number of steps, or fraction of all steps between 0 and 1"),
    "learning_rate": (-1e-3, "at least 0"),
    "adam_beta1": (1.0, "below 1"),
    "seed": (-1, "at least 0"),
}


def test_numbers_that_no_run_can_use():
    values = {key: value for key, (value, _) in OUTSIDE.items()}
    muon = {"momentum": 2.0, "ns_steps": 0}
    config = {"model": {}, "data": "stdlib", "sequence_length": 8, "training": values, "muon": muon}
    assert sorted(mistakes(config)) == sorted(
        [
            "muon.momentum: expected below 1, got 2.0",
            "muon.ns_steps: expected at least 1, got 0",
            *(
                f"training.{key}: expected {words}, got {value}"
                for key, (value, words) in OUTSIDE.items()
            ),
        ]
    )


def test_keys_that_a_run_decides_itself():
    training = {"resume_from_checkpoint": "x", "save_only_model": True, "ignore_data_skip": False}
    assert mistakes(
        {"model": {}, "data": "stdlib", "sequence_length": 8, "training": training}
    ) == [
        "training.resume_from_checkpoint: expected None, since the same command resumes from the"
        " newest complete checkpoint, got 'x'; remove the key",
        "training.save_only_model: expected False, since a run cannot resume from such a checkpoint;"
        " the output folder has the model, got True; remove the key",
    ]


def test_no_is_a_word(path):
    """YAML reads `no` as false."""
    assert load_config(path, ["training.save_strategy=no"]).training["save_strategy"] == "no"


def test_yaml_numbers_and_keys_given_twice():
    assert parse("[1e-3, 5e4, -2E+1, 1.5e-2, e3]", "x") == [1e-3, 5e4, -20.0, 1.5e-2, "e3"]
    with pytest.raises(ConfigError, match="expected each key once, got 'a' twice"):
        parse("{a: 1, a: 2}", "x")
    with pytest.raises(
        ConfigError, match=r"(?s)^x: expected valid YAML, got .* at line 1, col"
    ) as caught:
        parse("{a: 1\n b", "x")
    assert "<unicode string>" not in str(caught.value)  # x is named already


def test_a_config_file_that_is_not_there(path):
    with pytest.raises(
        ConfigError, match=r"expected an existing file, got none; try one of .*: small.yaml"
    ):
        load_config(path.with_name("samll.yaml"))
    with pytest.raises(
        ConfigError, match=r"existing file, got a folder; try one of .*: small.yaml"
    ):
        load_config(path.parent)
    path.write_bytes(b"model: \xff")
    with pytest.raises(ConfigError, match="expected a text file, got"):
        load_config(path)
    path.write_text("- 1")
    with pytest.raises(ConfigError, match="expected a mapping, got list"):
        load_config(path)


def config_of(**values):
    return parse_config({"model": {}, "data": "stdlib", "sequence_length": 64, **values})


def refused(**values):
    """Mistakes that show when the model meets its tokenizer and its rows."""
    with pytest.raises(ConfigError) as caught:
        model_config(config_of(**values), byte_tokenizer())
    return caught.value.mistakes


def of_model(**model):
    return mistakes({"model": model, "data": "stdlib", "sequence_length": 64})


LLAMA = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 2}


def test_sizes_come_from_the_tokenizer():
    made = model_config(config_of(model={"layout": "LS", "hidden_size": 32}), byte_tokenizer())
    assert (made.vocab_size, made.pad_token_id, made.eos_token_id) == (259, 256, 258)
    made = model_config(config_of(model={**LLAMA, "vocab_size": 320}), byte_tokenizer())
    assert (made.model_type, made.vocab_size) == ("llama", 320)


def test_a_model_that_does_not_fit_its_data():
    assert refused(model={**LLAMA, "max_position_embeddings": 32}) == [
        "sequence_length: expected at most the model's max_position_embeddings 32, got 64; try 32"
    ]
    for model in ({"layout": "LS", "hidden_size": 32}, {**LLAMA, "eos_token_id": 2}):
        assert refused(model={**model, "vocab_size": 100}) == [
            "model.vocab_size: expected at least 259, the tokens of tokenizer 'bytes', got 100; try 259"
            " or remove the key"
        ]


def test_a_model_s_keys_are_checked():
    assert of_model(**LLAMA, hiden_size=3) == [
        "model.hiden_size: unknown key, did you mean 'hidden_size'?"
    ]
    (line,) = of_model(layout="LS", hiden_size=3)
    assert line == "model.hiden_size: unknown key, did you mean 'hidden_size'?"
    assert of_model(model_type="lama") == [
        "model.model_type: unknown model type 'lama', did you mean 'llama'?"
    ]
    (line,) = of_model(model_type="llama", hidden_size="big")
    assert line.startswith("model: ")
    assert "hidden_size" in line


def test_a_device_that_is_absent(tmp_path):
    import torch

    absent = "mps" if torch.cuda.is_available() else "cuda"
    config = config_of(device=absent, training={"output_dir": str(tmp_path)})
    with pytest.raises(
        ConfigError, match=rf"device: expected a device of this machine \(.*\), got '{absent}'"
    ):
        training_arguments(config)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    training = {"output_dir": str(tmp_path / "file" / "run"), "max_steps": 1}
    with pytest.raises(ConfigError, match=r"training\.output_dir: .*file"):
        make_folder(training_arguments(config_of(training=training)))


def test_what_transformers_refuses_is_said_where_it_stands(tmp_path):
    training = {"output_dir": str(tmp_path), "lr_scheduler_type": "sine"}
    with pytest.raises(ConfigError, match=r"training\.lr_scheduler_type: expected .*, got 'sine'"):
        training_arguments(config_of(training=training))


@pytest.mark.parametrize(
    ("training", "line"),
    [
        (
            {"fp16": True},
            r"training\.fp16: expected false on a CPU, got true; try training\.bf16: true",
        ),
        ({"eval_strategy": "steps"}, r"training\.eval_strategy: expected 'no' without eval_data"),
    ],
)
def test_what_this_run_cannot_do(tmp_path, training, line):
    config = config_of(device="cpu", training={"output_dir": str(tmp_path), **training})
    with pytest.raises(ConfigError, match=line):
        training_arguments(config)


def test_a_folder_without_the_weights_of_the_model(tmp_path):
    sizes = {"hidden_size": 32, "vocab_size": 259}
    HybridForCausalLM(HybridConfig(layout="LS", **sizes)).save_pretrained(tmp_path)

    def missing(**keys):
        config = config_of(model={"path": str(tmp_path), **keys})
        with pytest.raises(ConfigError) as caught:
            load_model(config, model_config(config, byte_tokenizer()))
        return caught.value.mistakes

    where = f"model.path: {str(tmp_path)!r}"
    assert missing(layout="LL") == [
        f"{where} has no model.layers.1.mixer.gate_proj.weight",
        f"{where} has no model.layers.1.mixer.norm.norm.weight",
    ]
    assert f"{where} has model.embed_tokens.weight in another shape" in missing(hidden_size=64)
    (tmp_path / "model.safetensors").write_bytes(b"half")
    (line,) = missing()
    assert line.startswith(f"{where}: ")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="model: Unrecognized model"):
        model_config(config_of(model={"path": str(tmp_path)}), byte_tokenizer())


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_is_a_config(path, tmp_path):
    overrides = ["model.path=" + str(tmp_path)] if "path:" in path.read_text() else []
    config = load_config(path, overrides)
    assert config.training["output_dir"] == f"runs/{path.stem}"


def test_a_key_by_another_usual_name_is_recognised():
    values = {"model": {}, "data": "stdlib", "sequence_length": 8}
    with pytest.raises(ConfigError) as caught:
        parse_config({**values, "training": {"batch_size": 2, "auto_find_batch": True}})
    first, second = caught.value.mistakes
    assert first.endswith("unknown key, did you mean 'per_device_train_batch_size'?")
    assert "auto_find_batch_size" not in second  # which is refused, too
    known = {f.name for f in dataclasses.fields(TrainingArguments)}
    assert set(USUAL_NAMES.values()) <= known - set(DECIDED)
    assert not set(USUAL_NAMES) & known


def test_a_folder_that_cannot_be_written_is_named_before_the_run(tmp_path):
    (tmp_path / "file").touch()
    for folder, said in (
        (tmp_path / "file", "expected a folder, got the file"),
        ("/proc/self", "Errno"),
    ):
        with pytest.raises(ConfigError, match=rf"training.output_dir: .*{said}"):
            make_folder(SimpleNamespace(output_dir=str(folder)))

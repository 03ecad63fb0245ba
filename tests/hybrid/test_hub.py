"""Checkpoints that load elsewhere: in a fresh process, with this package and without it."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, pipeline

import hybrid
from hybrid.hub import DISTRIBUTION

LAYOUT = {"layout": "L[LS]", "mixers": {"L": {"num_heads": 2}, "S": {"num_heads": 2}}}

# Makes `import hybrid` fail as it does where the package is not installed.
BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hybrid":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture
def checkpoint(build, tmp_path):
    build(dtype=torch.float32, **LAYOUT).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(code, tmp_path, check=True):
    """Run code in a fresh interpreter that has imported nothing of ours."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "code")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_loads_in_a_fresh_process_that_never_imported_hybrid(
    checkpoint, tmp_path, ids, assert_same_weights, assert_close_to_rounding
):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    x = ids(1, 9)
    done = run(
        f"""
        import json, torch
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
        path = {str(checkpoint)!r}
        config = AutoConfig.from_pretrained(path, trust_remote_code=True)
        body = AutoModel.from_pretrained(path, trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
        names = [type(thing).__module__ for thing in (config, body, model)]
        logits = model(torch.tensor({x.tolist()})).logits
        model.save_pretrained({str(tmp_path / "again")!r})
        print(json.dumps([config.layout, names, logits.tolist()]))
        """,
        tmp_path,
    )
    layout, names, found = json.loads(done.stdout.splitlines()[-1])
    assert layout == "L[LS]"
    assert names == [
        "hybrid.config.hybrid_config",
        "hybrid.modeling.stack",
        "hybrid.modeling.model",
    ]
    expected = model(x).logits
    assert_close_to_rounding(torch.tensor(found, dtype=expected.dtype), expected)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), model)
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == sorted(
        p.name for p in checkpoint.iterdir()
    )


@pytest.mark.slow
@pytest.mark.parametrize("auto", ["AutoConfig", "AutoModel", "AutoModelForCausalLM"])
def test_names_the_package_to_install_where_it_is_missing(checkpoint, tmp_path, auto):
    code = f"from transformers import {auto}\n"
    code += f"{auto}.from_pretrained({str(checkpoint)!r}, trust_remote_code=True)"
    done = run(BLOCKED + code, tmp_path, check=False)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: this checkpoint is a hybrid language model")
    assert f"pip install {DISTRIBUTION}" in last


def test_the_distribution_named_is_this_one():
    from importlib.metadata import version

    assert version(DISTRIBUTION) == hybrid.__version__


def test_config_points_at_files_that_exist_and_define_what_it_says(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["model_type"] == "hybrid"
    assert config["architectures"] == ["HybridForCausalLM"]
    for reference in config["auto_map"].values():
        file, name = reference.split(".")
        namespace = {}
        exec(compile((checkpoint / f"{file}.py").read_text(), file, "exec"), namespace)
        assert namespace[name] is getattr(hybrid, name)


def test_other_ranks_write_no_files(build, tmp_path):
    build(**LAYOUT).save_pretrained(tmp_path, is_main_process=False)
    build(**LAYOUT).save_pretrained(tmp_path, False)
    assert not list(tmp_path.glob("*.py"))


def test_a_push_uploads_the_loading_files_too(build, tmp_path, monkeypatch):
    """transformers uploads at the end of its own save, when ours are not there yet."""
    model, pushed = build(**LAYOUT), []
    monkeypatch.setattr(type(model), "push_to_hub", lambda self, **kwargs: pushed.append(kwargs))
    model.save_pretrained(tmp_path / "name", push_to_hub=True, private=True)
    assert pushed == [{"repo_id": "name", "private": True}]
    assert (tmp_path / "name" / "modeling_hybrid.py").exists()


def test_sharded_checkpoint_loads(
    build, tmp_path, ids, assert_same_weights, assert_close_to_rounding
):
    model = build(**LAYOUT)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    x = ids(2, 7)
    assert_same_weights(again, model)
    assert_close_to_rounding(again(x).logits, model(x).logits)


def test_config_alone_and_overrides(checkpoint):
    config = AutoConfig.from_pretrained(checkpoint, max_position_embeddings=77)
    assert isinstance(config, hybrid.HybridConfig)
    assert config.max_position_embeddings == 77
    with pytest.raises(ValueError, match="hidden_siz: unknown key, did you mean 'hidden_size'"):
        hybrid.HybridConfig.from_dict({**config.to_dict(), "hidden_siz": 3})


def test_text_generation_pipeline(build, tmp_path):
    from hybrid.tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer()
    model = build(dtype=torch.float32, vocab_size=len(tokenizer), **LAYOUT)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path))
    out = generate("def f(", max_new_tokens=4, do_sample=False)
    assert out[0]["generated_text"].startswith("def f(")


@pytest.mark.filterwarnings("ignore")  # lm-eval and what it imports warn about one another
def test_lm_eval_scores_the_model_object(build):
    """`HFLM(pretrained=model)`, on a log-likelihood worked out by hand."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    from hybrid.tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer()
    model = build(dtype=torch.float32, vocab_size=len(tokenizer), **LAYOUT)
    lm = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=64)
    pairs = [("two words", " and more"), ("a", "b")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for (context, rest), (score, _) in zip(pairs, lm.loglikelihood(requests), strict=True):
        text = torch.tensor([tokenizer(context + rest, add_special_tokens=False)["input_ids"]])
        n = len(tokenizer(rest, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            log_probs = model(text).logits.log_softmax(-1)[0, -n - 1 : -1]
        expected = log_probs.gather(1, text[0, -n:, None]).sum().item()
        assert score == pytest.approx(expected, abs=1e-3)

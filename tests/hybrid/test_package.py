"""`import hybrid`: names on first use, and the model type in transformers whatever is imported first."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import hybrid
from hybrid.config.registry import feed_forwards, mixers

HEAVY = ("torch", "transformers", "numpy")


def run(code, *arguments):
    """Run code in a fresh interpreter."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    "statement",
    [
        "import hybrid",
        "dir(__import__('hybrid'))",
        "from hybrid import ConfigError, LayoutError, register_mixer",
        "from hybrid.config.registry import mixers; mixers.symbols()",
        "from hybrid.cli import main; main(['--help'])",
        "from hybrid.cli import main; main(['plan', '--help'])",
        "from hybrid.cli import main; main(['layout', 'LL[MS]'])",
    ],
)
def test_what_needs_no_model_imports_no_torch(statement):
    loaded = f"import sys; {statement}; print('loaded', *[m for m in {HEAVY} if m in sys.modules])"
    assert run(loaded)[-1] == "loaded"


def test_public_names():
    assert {"HybridConfig", "HybridForCausalLM", "LinearMixer"} <= set(hybrid.__all__)
    for name in hybrid.__all__:
        assert callable(getattr(hybrid, name))
    assert set(hybrid.__all__) <= set(dir(hybrid))
    assert hybrid.layout.parse("LS")  # modules, too
    with pytest.raises(AttributeError, match="HybridConfg"):
        _ = hybrid.HybridConfg


@pytest.mark.parametrize("registry", [mixers, feed_forwards], ids=["mixers", "feed_forwards"])
def test_declared_names_and_symbols_are_those_of_the_classes(registry):
    declared = {name: symbol for name, (symbol, _) in registry._declared.items()}
    assert {cls.name: cls.symbol for cls in map(registry.get, declared)} == declared
    ours = Path(sys.modules[registry.home].__file__).parent.glob("*.py")
    word = f"@register_{registry.kind.replace('-', '_')}("
    registered = [path for path in ours if word in path.read_text()]
    assert len(registered) == len(declared)


USES = {
    "transformers after": "import hybrid; from transformers import AutoModelForCausalLM as Auto",
    "transformers before": "import transformers as t; import hybrid; Auto = t.AutoModelForCausalLM",
    "Auto before": "from transformers import AutoModelForCausalLM as Auto; import hybrid",
    "a module that imports the Auto classes": "from hybrid.nn.rotary import *; import hybrid.mixers;"
    " from transformers import AutoModelForCausalLM as Auto",
    "a mixer": "from hybrid.mixers.softmax_attention import SoftmaxAttention;"
    " from transformers import AutoModelForCausalLM as Auto",
    "a model": "from hybrid import HybridModel;"
    " from transformers import AutoModelForSequenceClassification as Auto",
    "the config": "from hybrid.config.hybrid_config import HybridConfig;"
    " from transformers import AutoModelForTokenClassification as Auto",
}


@pytest.mark.slow
@pytest.mark.parametrize("use", USES)
def test_auto_classes_in_every_order_of_imports(use, build, tmp_path):
    build(layout="LS").save_pretrained(tmp_path)
    (tmp_path / "modeling_hybrid.py").unlink()
    code = f"{USES[use]}; import sys; print(type(Auto.from_pretrained(sys.argv[1])).__module__)"
    module = "classification" if "Classification" in USES[use] else "model"
    assert run(code, tmp_path)[-1] == f"hybrid.modeling.{module}"


@pytest.mark.slow
def test_a_config_from_another_process_finds_its_model(tmp_path):
    path = tmp_path / "config.pickle"
    path.write_bytes(pickle.dumps(hybrid.HybridConfig(layout="LS", hidden_size=16)))
    code = (
        "import pickle, sys; from transformers import AutoModelForCausalLM;"
        " config = pickle.loads(open(sys.argv[1], 'rb').read());"
        " print(config.layout, type(AutoModelForCausalLM.from_config(config)).__name__)"
    )
    assert run(code, path)[-2:] == ["LS", "HybridForCausalLM"]

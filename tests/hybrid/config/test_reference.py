"""The page of configuration keys: every key of every class, from the classes."""

import importlib.util
import re
from pathlib import Path

from hybrid.config.reference import keys, table
from hybrid.config.registry import mixers
from hybrid.distill.config import OutputsStage
from hybrid.train.config import MuonConfig, TrainConfig

DOCS = Path(__file__).parents[3] / "docs"


def test_the_table_says_what_a_key_expects():
    rows = {key.name: key for key in keys(MuonConfig)}
    assert rows["momentum"].expected == "float at least 0 and below 1"
    assert rows["adjust_lr_fn"].expected == "`original` or `match_rms_adamw`"
    assert rows["learning_rate"][1:3] == ("float at least 0 or null", "null")
    assert {key.name: key.default for key in keys(TrainConfig)}["model"] is None
    assert rows["nesterov"].expected == "true or false"
    assert {key.name: key.expected for key in keys(OutputsStage)}["freeze"].startswith("list of `")
    options = {key.name: key.expected for key in keys(mixers.get("mamba2").Options)}
    assert options["conv_size"] == "int at least 2 or null"


def test_the_page_has_every_key():
    spec = importlib.util.spec_from_file_location("keys_hook", DOCS / "keys.py")
    assert spec is not None
    assert spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    page = hook.on_page_markdown((DOCS / "reference" / "keys.md").read_text())
    assert "{{" not in page
    assert table(TrainConfig) in page
    for name in mixers.names():
        cls = mixers.get(name)
        if cls.__module__.startswith("hybrid."):
            assert f"### {name}\n\n{table(cls.Options)}" in page
    for line in (line for line in page.splitlines() if line.startswith("| `")):
        assert re.match(r"\| `\S+` \| [^|]+ \| [^|]+ \|", line), line

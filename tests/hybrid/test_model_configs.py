"""Every file of configs/models: the size that was published, or the budget that the file states."""

from pathlib import Path

import pytest
import yaml

from hybrid.plan import load_model_config, plan

FOLDER = Path(__file__).parents[2] / "configs" / "models"
FILES = sorted(FOLDER.rglob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_parameters_are_those_that_were_published(path):
    stated = yaml.safe_load(path.read_text(encoding="utf-8"))
    expected = stated["published"]["parameters"] if "published" in stated else stated["budget"]
    found = plan(load_model_config(str(path)), context=1).parameters
    assert abs(found / expected - 1) < 0.005


def test_sizes_of_one_budget_agree_with_each_other():
    counts = {}
    for path in sorted((FOLDER / "small").glob("*.yaml")):
        _, _, size = path.stem.partition("-")
        cost = plan(load_model_config(str(path)), context=1)
        counts.setdefault(size, []).append(cost.parameters)
    assert sorted(counts) == ["10m", "160m", "1b", "400m", "70m"]
    for found in counts.values():
        assert len(found) == 5
        assert max(found) / min(found) < 1.01

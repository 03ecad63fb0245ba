"""config.json as published, in the words of its day, against the same model in configs/models.

What transformers writes today says the same in other words; that is what other tests read.
"""

from pathlib import Path

import pytest

from hybrid.convert.checkpoint import read_json
from hybrid.convert.compare import differences
from hybrid.convert.configs import read_published, to_ours
from hybrid.convert.stack import on_meta
from hybrid.plan import load_model_config

CONFIGS = sorted((Path(__file__).parent / "published_configs").glob("*.json"))
OURS = Path(__file__).parents[2] / "configs" / "models" / "published"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_published_config_says_what_our_file_says(path):
    family, theirs = read_published(read_json(path), path)
    published = to_ours(family, theirs)
    ours = load_model_config(str(OURS / f"{path.stem}.yaml"))
    assert differences(family, on_meta(published), on_meta(ours)) == []
    assert published.max_position_embeddings == ours.max_position_embeddings

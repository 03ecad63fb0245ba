"""Files in a checkpoint with which it loads in processes that have not imported ``hybrid``."""

from __future__ import annotations

import json
from pathlib import Path

from hybrid.files import write_json, write_text

DISTRIBUTION = "hybrid-language-models"

AUTO_MAP = {
    "AutoConfig": "configuration_hybrid.HybridConfig",
    "AutoModel": "modeling_hybrid.HybridModel",
    "AutoModelForCausalLM": "modeling_hybrid.HybridForCausalLM",
    "AutoModelForSequenceClassification": "modeling_hybrid.HybridForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_hybrid.HybridForTokenClassification",
}

MODELS = (
    "HybridForCausalLM",
    "HybridForSequenceClassification",
    "HybridForTokenClassification",
    "HybridModel",
)

# Keyword arguments that ``save_pretrained(..., push_to_hub=True)`` passes to ``push_to_hub``.
PUSH_OPTIONS = ("repo_id", "commit_message", "private", "token", "revision", "create_pr")

# transformers copies these files to its module cache and imports them. They contain no model code,
# so the checkpoint always uses the installed version of the package.
_LOADING_FILE = '''"""Loads this checkpoint through the package `{distribution}`."""

try:
    from hybrid import {names}
except ImportError as error:
    raise ImportError(
        "this checkpoint is a hybrid language model and needs the package `{distribution}`:"
        " pip install {distribution}"
    ) from error

__all__ = [{quoted}]
'''


def add_loading_files(directory: str | Path) -> None:
    """Write ``configuration_hybrid.py``, ``modeling_hybrid.py`` and ``auto_map`` into a checkpoint
    folder.

    With them ``from_pretrained(directory, trust_remote_code=True)`` works in a process that has not
    imported ``hybrid``, and raises an error with the package to install if it is missing.
    """
    directory = Path(directory)
    files = {
        "configuration_hybrid.py": ["HybridConfig"],
        "modeling_hybrid.py": ["HybridConfig", *MODELS],
    }
    for name, exported in files.items():
        text = _LOADING_FILE.format(
            distribution=DISTRIBUTION,
            names=", ".join(exported),
            quoted=", ".join(f'"{item}"' for item in exported),
        )
        write_text(directory / name, text)
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = AUTO_MAP
    write_json(path, config, indent=2, sort_keys=True)

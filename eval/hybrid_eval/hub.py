"""Data sets of the hub, and the error if it cannot be reached."""

from pathlib import Path
from typing import Any


def unreachable(what: str, name: str, way_out: str) -> ValueError:
    """Return the error for a data set that could not be fetched.

    Args:
        what: the part that needs it; beginning of the message.
        name: name of the data set on the hub.
        way_out: what to try instead.
    """
    return ValueError(
        f"{what} needs the data set {name} from the hub, which cannot be reached and has no copy "
        f"in the local cache; {way_out}"
    )


def load_hub(
    name: str, *, split: str, what: str, way_out: str, config: str | None = None
) -> list[dict[str, Any]]:
    """Return the rows of one split of a data set on the hub, or of its local copy.

    Args:
        name: name of the data set.
        split: "test", "dev" ...
        what: the part that needs it, for the error.
        way_out: what to try if the hub cannot be reached, for the error.
        config: configuration of the data set, if it has several.

    Raises:
        ValueError: neither the hub nor a local copy can be read.
    """
    from datasets import Dataset, load_dataset

    try:
        rows = load_dataset(name, config, split=split)
    # offline, ``datasets`` raises ConnectionError, FileNotFoundError, or ValueError for a config
    # that is not in its cache
    except (OSError, ValueError, RuntimeError) as error:
        raise unreachable(what, name, way_out) from error
    assert isinstance(rows, Dataset)
    return rows.to_list()


def revision(name: str) -> str | None:
    """Return the commit of a data set: the hub's, or offline that of the local copy, if any."""
    from huggingface_hub import HfApi, constants

    try:
        return HfApi().dataset_info(name, timeout=10).sha
    # offline or not found: use the local copy; loading reports errors
    except (OSError, ValueError, RuntimeError):
        folder = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"
        head = folder / "refs" / "main"
        return head.read_text(encoding="utf-8").strip() if head.is_file() else None

"""What of a source is compared on resume."""

import numpy as np
import pytest

from hybrid.config.options import ConfigError
from hybrid.data import identity
from hybrid.data.identity import files_checksum, rows_checksum, spread_rows
from hybrid.data.rows import PluginRows, StreamedRows
from hybrid.train.checkpoints import refuse_other_run, write_manifest


def rows(changed=None, end=None):
    """Rows by index; the row `changed` has another label, and there is none from `end` on."""

    def row(index):
        if end is not None and index >= end:
            raise IndexError(index)
        ids = np.arange(index, index + 4)
        return {"input_ids": ids, "labels": ids + (index == changed)}

    return row


class Indexed:
    def __init__(self, *args):
        self.row = rows(*args)

    def __getitem__(self, index):
        return self.row(index)


@pytest.mark.parametrize("changed", [0, 17, 31, 64, 65536])
def test_an_indexed_plug_in_is_known_by_a_sample_of_rows_and_labels(changed):
    before, after = (PluginRows(Indexed(which), 4, 0).identity() for which in (None, changed))
    assert before.keys() == after.keys()
    assert before != after


def test_a_source_that_ends_is_known_by_what_it_has():
    assert rows_checksum(rows(end=40), spread_rows()) == rows_checksum(rows(), range(32))
    assert rows_checksum(rows(end=5), spread_rows()) == rows_checksum(rows(), range(5))


def test_a_stream_is_known_by_its_first_rows_and_its_origin():
    def stream(changed, origin):
        row = rows(changed)
        return StreamedRows(lambda: map(row, range(100)), lambda: {"origin": origin})

    plain = stream(None, 1).identity()
    assert plain == stream(32, 1).identity()
    assert plain != stream(31, 1).identity()
    assert plain != stream(None, 2).identity()
    again = stream(None, 1)
    again.identity()
    assert again.row(0)["input_ids"][0] == 0


@pytest.mark.parametrize("whole", [True, False])
def test_files_are_known_by_name_size_and_content(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(identity, "BLOCK_BYTES", 10)
    monkeypatch.setattr(identity, "WHOLE_BYTES", 10_000 if whole else 80)
    first, second = tmp_path / "a", tmp_path / "b"
    content = bytes(range(256)) * 2
    first.write_bytes(content)
    second.write_bytes(b"short")
    files = [str(first), str(second)]
    plain = files_checksum(files)
    assert files_checksum(files) == plain
    seen = []
    for place in range(len(content)):
        first.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
        same = content[place] == 255
        if files_checksum(files) != plain:
            seen.append(place)
        else:
            assert same or not whole
    # of the long file three blocks of ten and the last two bytes, one of which is 255 already
    assert len(seen) == (510 if whole else 31)
    assert 0 in seen
    assert 510 in seen
    first.write_bytes(content + b"x")
    assert files_checksum(files) != plain
    first.write_bytes(content)
    second.rename(tmp_path / "c")
    assert files_checksum([str(first), str(tmp_path / "c")]) != plain


def test_what_is_not_known_is_not_compared(tmp_path):
    """A hub that cannot be asked must not end a run; another commit must."""
    run = {"data": "x", "data[0] (x): commit on the hub": "abc"}
    write_manifest(tmp_path, run)
    refuse_other_run(tmp_path, {**run, "data[0] (x): commit on the hub": None})
    with pytest.raises(ConfigError, match="commit on the hub: was 'abc', is 'abd'"):
        refuse_other_run(tmp_path, {**run, "data[0] (x): commit on the hub": "abd"})


def test_the_commit_of_a_hub_data_set(monkeypatch):
    from huggingface_hub import HfApi

    class Info:
        sha = "abc"

    monkeypatch.setattr(HfApi, "dataset_info", lambda self, name: Info)
    assert identity.hub_revision("user/name") == "abc"

    def offline(self, name):
        raise ConnectionError("no hub here")

    monkeypatch.setattr(HfApi, "dataset_info", offline)
    assert identity.hub_revision("user/name") is None

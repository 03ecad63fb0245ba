import gzip
import json
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from hybrid.config.declare import build
from hybrid.config.options import ConfigError
from hybrid.data import prepare
from hybrid.data.documents import INDEX, open_shards
from hybrid.data.mixture import BLOCK, DataError, Mixture, shares
from hybrid.data.rows import StreamedRows, complete
from hybrid.data.sources import (
    RowFormat,
    SourceConfig,
    open_source,
    open_texts,
    source_names,
)
from hybrid.data.stdlib import held_out, stdlib_files
from hybrid.data.texts import load_texts
from hybrid.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
TEXTS = ["the first text", "2nd", "and a third one, longer than the others"]


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Install a package whose module defines `numbers`, an entry point of `hybrid.data`."""

    def install(code):
        site = tmp_path / "site"
        info = site / "numbers_of_mine-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: numbers-of-mine\nVersion: 1.0\n"
        )
        (info / "entry_points.txt").write_text("[hybrid.data]\nnumbers = numbers_of_mine:numbers\n")
        (site / "numbers_of_mine.py").write_text(code)
        monkeypatch.delitem(sys.modules, "numbers_of_mine", raising=False)
        monkeypatch.syspath_prepend(site)

    return install


def write(folder, suffix, texts=TEXTS, key="text"):
    path = folder / f"data{suffix}"
    if suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({key: texts, "other": texts}), path)
    else:
        path.write_text("".join(json.dumps({key: t, "other": 1}) + "\n" for t in texts))
    return str(path)


def rows_of(config, length=16, seed=0, **kwargs):
    return open_source(config, TOKENIZER, RowFormat(length, 256, **kwargs), seed)


def texts_in(rows, number):
    """The set of whole documents in the first rows of a source that does not pack."""
    ids = [rows.row(i)["input_ids"] for i in range(number)]
    return sorted(bytes(i[i < 256].astype(np.uint8)).decode() for i in ids)


# The standard library's sources


def test_the_library_is_split_by_path_alone():
    train, apart = stdlib_files("train"), stdlib_files("heldout")
    assert not set(train) & set(apart)
    assert len(train) > 10 * len(apart) > 0
    assert not any({"test", "site-packages", "idlelib"} & set(p.parts) for p in train + apart)
    assert held_out(Path("typing.py")) == (zlib.crc32(b"typing.py") % 20 == 0)


def test_a_tree_of_files_is_read_by_the_rule(tmp_path):
    for name in ("a.py", "b/c.py", "b/tests/d.py", "test/e.py", "f.txt", "lib2to3/g.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    both = [*stdlib_files("train", tmp_path), *stdlib_files("heldout", tmp_path)]
    assert sorted(p.relative_to(tmp_path).as_posix() for p in both) == ["a.py", "b/c.py"]


# Files


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_files_of_texts(tmp_path, suffix):
    path = write(tmp_path, suffix, key="body")
    rows = rows_of(SourceConfig(source=path, text_key="body"), length=64, packing="none")
    assert rows.per_epoch == 3
    assert texts_in(rows, 3) == sorted(TEXTS)


def test_a_text_file_is_one_document(tmp_path):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text + "\n\nmore")
    rows = rows_of(SourceConfig(source=str(tmp_path / "*.txt")), length=64, packing="none")
    assert texts_in(rows, 3) == sorted(t + "\n\nmore" for t in TEXTS)


def test_a_stream_gives_rows_without_end_and_by_index(tmp_path):
    config = SourceConfig(source=write(tmp_path, ".jsonl"), streaming=True)
    rows = rows_of(config)
    assert rows.per_epoch is None
    ahead = [rows.row(i)["input_ids"] for i in range(12)]
    stream = b"".join(t.encode() + b"\0" for t in TEXTS)
    found = np.concatenate(ahead)
    found[found == 258] = 0
    assert bytes(found.astype(np.uint8)) == (stream * 9)[: len(found)]
    back = rows_of(config)
    for index in (7, 3, 3, 11):
        np.testing.assert_array_equal(back.row(index)["input_ids"], ahead[index])


def test_workers_read_a_stream_of_several_files_whole(tmp_path):
    for number in range(3):
        lines = [json.dumps({"text": f"{number} {i} " + "a" * 12}) for i in range(4)]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(lines))
    rows = rows_of(SourceConfig(source=str(tmp_path), streaming=True))
    expected = [rows.row(i)["input_ids"] for i in range(9)]
    loader = DataLoader(Mixture([rows], [1.0], 9, seed=0), batch_size=None, num_workers=2)
    found = [batch["input_ids"].numpy() for batch in loader]
    np.testing.assert_array_equal(found, expected)


def test_a_stream_is_read_again_after_an_error():
    def start():
        yield complete({"input_ids": [1], "labels": [1]}, 1, 0)
        raise ValueError("row 1 is broken")

    rows = StreamedRows(start)
    for _ in range(2):
        with pytest.raises(ValueError, match="row 1 is broken"):
            rows.row(1)
        assert rows.row(0)["input_ids"] == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_an_absent_column_is_named_with_those_there_are(tmp_path, streaming):
    config = SourceConfig(source=write(tmp_path, ".jsonl"), text_key="content", streaming=streaming)
    with pytest.raises(
        ValueError, match=r"text_key: expected a column of .*, 'text', 'other', got 'content'"
    ):
        rows_of(config)


def test_a_column_that_holds_no_text(tmp_path):
    with pytest.raises(ValueError, match=r"row 0 of .*expected text in column 'other', got int"):
        rows_of(SourceConfig(source=write(tmp_path, ".jsonl"), text_key="other"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_without_its_text_is_named(tmp_path, streaming):
    path = write(tmp_path, ".jsonl", [*TEXTS, None])
    with pytest.raises(ValueError, match=r"row 3 of .*expected text in column 'text', got null"):
        rows_of(SourceConfig(source=path, streaming=streaming)).row(20)


def test_files_that_are_not_there(tmp_path):
    write(tmp_path, ".jsonl")
    with pytest.raises(
        ValueError, match=r"expected existing files, got none, did you mean '.*data\.jsonl'"
    ):
        rows_of(SourceConfig(source=str(tmp_path / "dta.jsonl")))
    with pytest.raises(ValueError, match="there is no folder"):
        rows_of(SourceConfig(source=str(tmp_path / "nowhere" / "x.txt")))


def test_files_of_two_formats(tmp_path):
    write(tmp_path, ".jsonl")
    write(tmp_path, ".parquet")
    with pytest.raises(ValueError, match=r"files of one format, got .jsonl, .parquet"):
        rows_of(SourceConfig(source=str(tmp_path / "data.*")))


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("texts", [["", ""], []])
def test_an_empty_source(tmp_path, texts, streaming, ends):
    """No rows, or rows without a token but the one that ends a text, if the tokenizer has that."""
    tokenizer = byte_tokenizer()
    if not ends:
        tokenizer.eos_token = None
    path = write(tmp_path, ".jsonl", texts)
    with pytest.raises(ValueError, match=r"expected (text|a document of at least two tokens), got"):
        open_source(
            SourceConfig(source=path, streaming=streaming), tokenizer, RowFormat(8, 256), 0
        ).row(0)


def test_a_folder_without_a_file_that_is_read(tmp_path):
    (tmp_path / "notes.pdf").write_text("")
    with pytest.raises(ValueError, match=r"expected files in the folder \(.*\.jsonl"):
        rows_of(SourceConfig(source=str(tmp_path)))


def test_a_stream_is_packed_as_the_run_says(tmp_path):
    config = SourceConfig(source=write(tmp_path, ".jsonl"), streaming=True)
    form = RowFormat(64, 256, "none", "truncate")
    assert texts_in(open_source(config, TOKENIZER, form, 0), 3) == sorted(TEXTS)


def test_a_packed_file_that_cannot_be_unpacked_here(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    monkeypatch.setattr("hybrid.data.texts.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"x\.jsonl\.zst: expected the package zstandard, got none; try pip inst"
    ):
        rows_of(SourceConfig(source=str(tmp_path / "x.jsonl.zst")))


def test_a_name_that_is_nearly_a_file_s_is_no_data_set_of_the_hub(tmp_path, monkeypatch):
    write(tmp_path, ".jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"data.jsnl: expected a data set, got .*, did you mean 'data.j"
    ):
        rows_of(SourceConfig(source="data.jsnl"))


def test_a_broken_file_says_so(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(ValueError, match=r"x.jsonl: expected a data set, got "):
        rows_of(SourceConfig(source=str(tmp_path / "x.jsonl")))


def test_a_misspelt_name_is_no_data_set_of_the_hub():
    with pytest.raises(ValueError, match="unknown source 'stdlb', did you mean 'stdlib'"):
        open_texts(SourceConfig(source="stdlb"))


def test_each_epoch_has_an_order_of_its_own(tmp_path):
    path = write(tmp_path, ".jsonl", [f"{n:03d}" for n in range(50)])
    rows = rows_of(SourceConfig(source=path), packing="none")
    order = [bytes(rows.row(i)["input_ids"][:3].astype(np.uint8)) for i in range(150)]
    epochs = [order[i : i + 50] for i in (0, 50, 100)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert len({tuple(sorted(e)) for e in epochs}) == 1
    again = rows_of(SourceConfig(source=path), packing="none")
    assert bytes(again.row(77)["input_ids"][:3].astype(np.uint8)) == order[77]
    other = rows_of(SourceConfig(source=path), packing="none", seed=1)
    assert [bytes(other.row(i)["input_ids"][:3].astype(np.uint8)) for i in range(50)] != epochs[0]


# Plug-ins


def test_a_plug_in_of_another_package(plugin):
    plugin(
        "import numpy as np\n"
        "def numbers(*, sequence_length, seed, tokenizer, first=0):\n"
        "    for i in range(10 ** 9):\n"
        "        ids = np.full(sequence_length - 1, first + i)\n"
        "        yield {'input_ids': ids, 'labels': ids}\n"
    )
    assert "numbers" in source_names()
    mistakes = []
    config = build(
        SourceConfig, {"source": "numbers", "first": 5, "weight": 2}, "data[0]", mistakes
    )
    assert mistakes == []
    assert config == SourceConfig(source="numbers", weight=2.0, options={"first": 5})
    rows = rows_of(config, length=4)
    assert rows.row(3)["input_ids"].tolist() == [8, 8, 8, 256]
    assert rows.row(3)["labels"].tolist() == [8, 8, 8, -100]
    assert rows.row(3)["position_ids"].tolist() == [0, 1, 2, 0]
    assert rows.row(1)["input_ids"].tolist() == [6, 6, 6, 256]


def test_a_plug_in_that_answers_an_index_is_asked_for_it(plugin):
    plugin(
        "class Numbers:\n"
        "    def __getitem__(self, i):\n"
        "        return {'input_ids': [i], 'labels': [i]}\n"
        "def numbers(*, sequence_length, seed, tokenizer):\n"
        "    return Numbers()\n"
    )
    rows = rows_of(SourceConfig(source="numbers"), length=1)
    assert rows.row(10**12)["input_ids"].tolist() == [10**12]


def test_an_unknown_option_of_a_plug_in(plugin):
    plugin("def numbers(*, sequence_length, seed, tokenizer, first=0):\n    return []\n")
    mistakes = []
    build(SourceConfig, {"source": "numbers", "frist": 5}, "data[1]", mistakes)
    assert mistakes == [
        "data[1].frist: unknown option of 'numbers', did you mean 'first'?",
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1]}, "row: expected a key 'labels', got keys ['input_ids']"),
        ({"input_ids": [1, 2], "labels": [1]}, "got (2,) and (1,)"),
        ({"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, "1 <= T <= sequence_length 2"),
    ],
)
def test_a_row_that_is_none(row, message):
    with pytest.raises(ValueError, match="row") as caught:
        complete(row, 2, 0)
    assert message in str(caught.value)


def test_a_plug_in_is_not_split_among_workers(plugin):
    plugin(
        "from torch.utils.data import IterableDataset, get_worker_info\n"
        "class Numbers(IterableDataset):\n"
        "    def __iter__(self):\n"
        "        info = get_worker_info()\n"
        "        step = 1 if info is None else info.num_workers\n"
        "        for i in range(0 if info is None else info.id, 100, step):\n"
        "            yield {'input_ids': [i], 'labels': [i]}\n"
        "def numbers(*, sequence_length, seed, tokenizer):\n"
        "    return Numbers()\n"
    )
    rows = rows_of(SourceConfig(source="numbers"), length=1)
    rows.row(20)
    loader = DataLoader(Mixture([rows], [1.0], 8, seed=0), batch_size=None, num_workers=2)
    assert [int(batch["input_ids"]) for batch in loader] == list(range(8))


def test_a_plug_in_that_ends():
    rows = StreamedRows(lambda: iter([complete({"input_ids": [1], "labels": [1]}, 1, 0)] * 2))
    with pytest.raises(ValueError, match="expected a source without an end, got 2 rows"):
        rows.row(5)


@pytest.mark.parametrize(
    ("values", "mistake"),
    [
        ({"source": "mqra", "pairs": 4}, "data: unknown source 'mqra', did you mean 'mqar'?"),
        ({"source": ["mqar"]}, "data.source: expected str, got list ['mqar']"),
        ({"source": "stdlib", "options": {}},
         "data.options: expected none, since 'stdlib' is not a plug-in, got dict {}"),
        ({"source": "my.jsonl", "split": "heldout"},
         "data.split: expected none for files, got 'heldout'; try naming the files in `source`"),
        ({"source": "texts/*.txt", "name": "en"},
         "data.name: expected none for files, got 'en'; try naming the files in `source`"),
    ],
)  # fmt: skip
def test_mistakes_in_an_entry_are_named(values, mistake):
    mistakes = []
    build(SourceConfig, values, "data", mistakes)
    assert mistakes == [mistake]


# Mixtures


class Counted:
    """Rows that say where they come from."""

    per_epoch = None

    def __init__(self, name):
        self.name = name

    def row(self, index):
        return self.name, index


def test_a_mixture_takes_each_source_in_order_and_by_weight():
    mixture = Mixture([Counted("a"), Counted("b"), Counted("c")], [6, 3, 1], 2 * BLOCK, 0)
    rows = [mixture[i] for i in range(len(mixture))]
    assert len(rows) == 2 * BLOCK
    for name, share in (("a", 0.6), ("b", 0.3), ("c", 0.1)):
        assert [i for n, i in rows if n == name] == list(range(round(2 * BLOCK * share)))
    # Mixed throughout, not one source after the other.
    first = [n for n, _ in rows[:200]]
    assert {"a", "b", "c"} == set(first)
    assert rows[:BLOCK] != rows[BLOCK:]


def test_a_mixture_answers_any_row_without_those_before():
    def make(seed=0):
        return Mixture([Counted("a"), Counted("b")], [0.37, 0.63], 5 * BLOCK, seed)

    ahead, fresh = [make()[i] for i in range(5 * BLOCK)], make()
    for index in (4 * BLOCK + 17, 3, 2 * BLOCK, 5 * BLOCK - 1):
        assert fresh[index] == ahead[index]
    assert [make(1)[i] for i in range(100)] != ahead[:100]
    with pytest.raises(IndexError):
        fresh[5 * BLOCK]


def test_a_mixture_says_which_row_of_which_source_failed():
    class Large(Counted):
        def row(self, index):
            if index == 3:
                raise OSError("the disk is gone")
            return {"input_ids": np.array([1, 7 * index])}

    mixture = Mixture([Large("a")], [1.0], 10, 0, vocabulary=8)
    assert mixture[1]["input_ids"].tolist() == [1, 7]
    with pytest.raises(DataError, match=r"row 2 of source 0: token id: expected .* 8, got 14"):
        mixture[2]
    with pytest.raises(DataError, match=r"row 3 of source 0: the disk is gone"):
        mixture[3]


def test_shares_add_up_and_a_share_of_nothing_is_refused():
    assert shares([1, 1, 1]).tolist() == [334, 333, 333]
    with pytest.raises(
        ValueError, match=r"data\[1\].weight: expected at least one row in .*got 0.0001 of 1.0001"
    ):
        shares([1, 0.0001])


# Prepared data


def test_prepared_data_gives_the_rows_of_the_source(tmp_path):
    source, folder = write(tmp_path, ".jsonl"), tmp_path / "ready"
    index = prepare(source, folder, shard_tokens=18)
    assert (index["documents"], index["tokens"]) == (3, sum(map(len, TEXTS)) + 3)
    assert [s["documents"] for s in index["shards"]] == [2, 1]
    prepared = rows_of(SourceConfig(source=str(folder)), length=64, packing="none")
    assert texts_in(prepared, 3) == sorted(TEXTS)
    assert isinstance(open_shards(folder)[0].tokens, np.memmap)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shards": 5}, "shards: expected list, got 5"),
        ({"shards": [5]}, "shards.0.: expected an entry with the name of a shard, got 5"),
        ({"shards": [{"name": "../x"}]}, "shards.0.: expected an entry with the name of a shard"),
        ({"shards": [{"name": "0", "tokens": -1}]}, "shards.0..tokens: expected a count, got -1"),
        ({"vocabulary": None}, "vocabulary: expected int, got None"),
    ],
)
def test_a_damaged_index_of_prepared_data_is_one_line(tmp_path, change, words):
    folder = tmp_path / "ready"
    index = prepare(write(tmp_path, ".jsonl"), folder)
    (folder / INDEX).write_text(json.dumps({**index, **change}))
    with pytest.raises(ValueError, match=f"{words}.*; prepare the data again"):
        open_shards(folder)


@pytest.mark.parametrize(
    ("kind", "array", "words"),
    [
        ("tokens", np.float32(3), "tokens: expected a 1-d array of integers, got 0-d float32"),
        (
            "tokens",
            np.zeros((2, 2), np.uint16),
            "tokens: expected a 1-d array of integers, got 2-d",
        ),
        ("offsets", np.zeros(4), "offsets: expected a 1-d array of integers, got 1-d float64"),
        ("offsets", np.zeros(0, np.int64), "offsets: expected 0 to"),
    ],
)
def test_a_damaged_shard_of_prepared_data_is_one_line(tmp_path, kind, array, words):
    folder = tmp_path / "ready"
    prepare(write(tmp_path, ".jsonl"), folder)
    np.save(folder / f"{kind}-00000.npy", array)
    with pytest.raises(ValueError, match=f"shard 00000: {words}"):
        open_shards(folder)


def test_offsets_that_fall_are_damage(tmp_path):
    folder = tmp_path / "ready"
    prepare(write(tmp_path, ".jsonl"), folder)
    offsets = np.load(folder / "offsets-00000.npy")
    np.save(folder / "offsets-00000.npy", offsets[[0, 2, 1, 3]])
    with pytest.raises(ValueError, match="shard 00000: offsets: expected ascending values"):
        open_shards(folder)


def test_prepared_data_in_doubt_is_refused(tmp_path):
    folder = tmp_path / "ready"
    prepare(write(tmp_path, ".jsonl"), folder)
    with pytest.raises(ValueError, match="expected a folder without prepared data"):
        prepare(write(tmp_path, ".jsonl"), folder)
    other = byte_tokenizer()
    other.add_tokens(["x1"])
    with pytest.raises(ValueError, match=r"this run's tokenizer of 260 tokens, got one of 259"):
        open_source(SourceConfig(source=str(folder)), other, RowFormat(8, 256), 0)
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, "fingerprint": index["fingerprint"] ^ 1}))
    with pytest.raises(ValueError, match="with other ids; prepare it again"):
        rows_of(SourceConfig(source=str(folder)))
    np.save(folder / "tokens-00000.npy", np.zeros(3, np.uint16))
    with pytest.raises(ValueError, match="shard 00000: offsets: expected 0 to"):
        open_shards(folder)
    (folder / INDEX).write_text("")
    with pytest.raises(
        ValueError, match=f"{INDEX}: expected valid JSON, got .*; prepare the data again"
    ):
        open_shards(folder)
    (folder / INDEX).unlink()
    with pytest.raises(ValueError, match=f"folder of prepared data with {INDEX}"):
        open_shards(folder)


def test_prepare_names_an_unknown_option(tmp_path):
    with pytest.raises(ConfigError, match="text_kye: unknown key, did you mean 'text_key'"):
        prepare("stdlib", tmp_path / "x", text_kye="y")


def test_a_file_that_breaks_off_or_is_no_json_is_named_with_its_line(tmp_path):
    whole = [json.dumps({"text": f"{i} " * 20000}) for i in range(60)]
    broken, cut = tmp_path / "broken.jsonl", tmp_path / "cut.jsonl.gz"
    broken.write_text("\n".join([*whole, "", '{"text": "ab', *whole]))
    cut.write_bytes(gzip.compress("\n".join(whole).encode())[:-200])
    options = {"text_key": "text", "split": "train", "name": None, "streaming": True}
    for path, said in (
        (broken, f"{broken}, line 62: Invalid control"),
        (cut, "Compressed file ended"),
    ):
        with pytest.raises(
            ValueError, match=rf"{path}: expected (readable rows|a data set), got .*{said}"
        ):
            list(load_texts(str(path), **options)(0))

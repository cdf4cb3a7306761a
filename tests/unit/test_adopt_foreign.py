"""Token files of other software: their type, their end tokens and their documents, with values worked out by hand."""

import gzip
import io
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from codeparrot_ds.errors import ConfigError, DataError
from codeparrot_ds.shards.adopt import adopt
from codeparrot_ds.shards.foreign import open_tokens
from codeparrot_ds.shards.format import Manifest
from codeparrot_ds.shards.inspect import inspect_sequence
from codeparrot_ds.shards.match import unchanged
from codeparrot_ds.shards.sequences import Dataset
from codeparrot_ds.shards.verify import verify
from codeparrot_ds.system.files import MANIFEST
from codeparrot_ds.tokenizer.encode import Encoder
from tests.tokenizer_kinds import added_token, only_bytes, save

# Three documents, ended by id 0: 4 + 2 + 5 = 11 tokens. A validation fraction of 0.3 is 3.3 of them: the last document.
STREAM = [5, 6, 7, 0, 8, 0, 9, 10, 11, 12, 0]
BARE = [[5, 6, 7], [8], [9, 10, 11, 12]]  # the same without end tokens
MEGATRON_CODES = {"u1": 1, "i1": 2, "i2": 3, "i4": 4, "i8": 5, "f8": 6, "f4": 7, "u2": 8}


def write_megatron(
    prefix: Path, documents: Sequence[Sequence[Sequence[int]]], dtype: str = "u2", modes: bool = False
) -> Path:
    """Write documents, each a list of sequences of ids, as Megatron-LM does."""
    sequences = [sequence for document in documents for sequence in document]
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    item = np.dtype(dtype).itemsize
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype("<i8") * item
    firsts = np.cumsum([0, *map(len, documents)]).astype("<i8")
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, MEGATRON_CODES[dtype], len(sequences), len(firsts))
    index = header + lengths.tobytes() + offsets.tobytes() + firsts.tobytes()
    prefix.with_name(prefix.name + ".idx").write_bytes(index + (bytes(len(sequences)) if modes else b""))
    np.concatenate([np.array(s, f"<{dtype}") for s in sequences]).tofile(f"{prefix}.bin")
    return prefix


def ended(documents: Sequence[Sequence[int]]) -> list[list[list[int]]]:
    """One sequence per document, ended by id 0."""
    return [[[*document, 0]] for document in documents]


def facts(manifest: Manifest) -> tuple[str, list[tuple[str, int, int]]]:
    """The type, and split, documents and tokens of each shard."""
    return manifest.dtype, [(shard.split, shard.documents, shard.tokens) for shard in manifest.shards]


def ids_of(directory: Path) -> tuple[list[int], list[int]]:
    """What training reads of each split, one id more than whole sequences of 1."""
    data = Dataset.open({directory: 1.0}, 1)
    read = []
    for split in (data.train, data.valid):
        rows = split.batch(np.arange(len(split)))
        read.append([*rows[:, 0].tolist(), int(rows[-1, 1])])
    return read[0], read[1]


@pytest.fixture(scope="module")
def large_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 70,000 ids; the last is the end token."""
    directory = tmp_path_factory.mktemp("large")
    content = json.loads(only_bytes().to_str())
    content["model"]["vocab"] |= {f"<w{i}>": i for i in range(257, 69_999)} | {"<|endoftext|>": 69_999}
    content["added_tokens"] = [added_token("<|endoftext|>", 69_999, special=True)]
    return save(Tokenizer.from_str(json.dumps(content)), directory)


@pytest.mark.parametrize("dtype", ["<u4", "<i4"])
def test_ids_of_four_bytes_are_adopted_as_such(data: Path, tmp_path: Path, dtype: str) -> None:
    """Read as uint16, every second id would be 0, the end token: 14 documents of 22 tokens."""
    np.array(STREAM, dtype).tofile(tmp_path / "train.bin")
    manifest = adopt(tmp_path / "train", data / "tokenizer", valid_fraction=0.3)
    assert facts(manifest) == ("int32", [("train", 2, 6), ("valid", 1, 5)])
    verify(tmp_path, deep=True)
    assert ids_of(tmp_path) == (STREAM[:6], STREAM[6:])


def test_ids_beyond_65535_are_read_whole(large_tokenizer: Path, tmp_path: Path) -> None:
    stream = [68_000, 1, 69_999, 2, 66_000, 3, 69_999]
    np.array(stream, "<u4").tofile(tmp_path / "train.bin")
    manifest = adopt(tmp_path / "train", large_tokenizer, valid_fraction=0.5)
    assert facts(manifest) == ("int32", [("train", 1, 3), ("valid", 1, 4)])
    assert ids_of(tmp_path) == (stream[:3], stream[3:])


def test_two_bytes_cannot_hold_the_ids_of_a_large_vocabulary(large_tokenizer: Path, tmp_path: Path) -> None:
    """The end token, 69,999, is stored as 4,463."""
    np.array([700, 1, 4_463, 2, 3, 4_463], "<u2").tofile(tmp_path / "train.bin")
    with pytest.raises(DataError, match=r"uint16.*70,000"):
        adopt(tmp_path / "train", large_tokenizer)
    for dtype, name in (("u2", "uint16"), ("i2", "int16")):
        write_megatron(tmp_path / "its", [[[700, 1, 4_463]], [[2, 3, 4_463]]], dtype)
        with pytest.raises(DataError, match=rf"{name}.*70,000"):
            adopt(tmp_path / "its", large_tokenizer)


@pytest.mark.parametrize(("dtype", "name"), [("u1", "uint8"), ("i1", "int8")])
def test_one_byte_cannot_hold_the_ids_of_any_vocabulary_here(data: Path, tmp_path: Path, dtype: str, name: str) -> None:
    write_megatron(tmp_path / "its", ended(BARE), dtype)
    with pytest.raises(DataError, match=rf"{name}.*512"):
        adopt(tmp_path / "its", data / "tokenizer", output=tmp_path / "out")


@pytest.mark.parametrize(
    ("dtype", "named"),
    [
        ("<i8", "int64"),
        ("<u8", "int64"),
        (">u2", "big-endian uint16"),
        (">u4", "big-endian int32"),
        (">i8", "big-endian int64"),
        ("<f4", "float32"),
        ("<f8", "float64"),
    ],
)
def test_other_types_are_named_and_can_be_copied(data: Path, tmp_path: Path, dtype: str, named: str) -> None:
    np.array(STREAM, dtype).tofile(tmp_path / "train.bin")
    with pytest.raises(DataError, match=rf"train.bin: .*{named}.*--output"):
        adopt(tmp_path / "train", data / "tokenizer")
    assert not (tmp_path / "manifest.json").exists()
    manifest = adopt(tmp_path / "train", data / "tokenizer", valid_fraction=0.3, output=tmp_path / "copy")
    assert facts(manifest) == ("uint16", [("train", 2, 6), ("valid", 1, 5)])
    verify(tmp_path / "copy", deep=True)
    assert ids_of(tmp_path / "copy") == (STREAM[:6], STREAM[6:])
    assert not (tmp_path / "manifest.json").exists()


def test_a_file_that_may_be_of_two_types_is_refused(data: Path, tmp_path: Path) -> None:
    """uint32 ids without an end token, or uint16 documents of one token."""
    np.array([5, 6, 7, 8], "<u4").tofile(tmp_path / "train.bin")
    with pytest.raises(DataError, match=r"(?s)int32.*uint16.*--dtype"):
        adopt(tmp_path / "train", data / "tokenizer")
    with pytest.raises(DataError, match="no end token"):
        adopt(tmp_path / "train", data / "tokenizer", dtype="uint32")
    manifest = adopt(tmp_path / "train", data / "tokenizer", dtype="uint16", valid_fraction=0.5)
    assert facts(manifest) == ("uint16", [("train", 2, 4), ("valid", 2, 4)])


def test_the_type_given_is_tested_too(data: Path, tmp_path: Path) -> None:
    np.array([*STREAM, 0], "<u2").tofile(tmp_path / "train.bin")
    with pytest.raises(DataError, match=r"contains id 786,443"):  # 11 + 12 * 65,536
        adopt(tmp_path / "train", data / "tokenizer", dtype="uint32")
    with pytest.raises(ConfigError, match="dtype 'int7'"):
        adopt(tmp_path / "train", data / "tokenizer", dtype="int7")
    write_megatron(tmp_path / "its", ended(BARE))
    with pytest.raises(ConfigError, match=r"its.idx.*uint16"):
        adopt(tmp_path / "its", data / "tokenizer", dtype="int32")


def llm_c(ids: Sequence[int], magic: int = 20240520, version: int = 1, dtype: str = "<u2") -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids)
    return header.tobytes() + np.array(ids, dtype).tobytes()


def npy(ids: Sequence[int]) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(ids, "<u2"))
    return file.getvalue()


@pytest.mark.parametrize("content", [llm_c(STREAM), llm_c(STREAM, 20240801, 7, "<u4"), npy(STREAM)])
def test_a_header_is_not_read_as_ids(data: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"header.*--output"):
        adopt(tmp_path / "train", data / "tokenizer")
    manifest = adopt(tmp_path / "train", data / "tokenizer", valid_fraction=0.3, output=tmp_path / "copy")
    assert facts(manifest) == ("uint16", [("train", 2, 6), ("valid", 1, 5)])
    assert ids_of(tmp_path / "copy") == (STREAM[:6], STREAM[6:])


def test_a_header_that_counts_other_tokens_means_a_truncated_file(data: Path, tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(llm_c(STREAM)[:-4])
    with pytest.raises(DataError, match=r"9 tokens.*11"):
        adopt(tmp_path / "train", data / "tokenizer", output=tmp_path / "copy")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (gzip.compress(np.array(STREAM, "<u2").tobytes(), mtime=0), "gzip"),
        (b"PK\x03\x04" + bytes(100), "zip"),
        (b"\x28\xb5\x2f\xfd" + bytes(100), "zstd"),
        (b"MMIDIDX\0\0" + bytes(101), "index"),
        (b" ".join(b"%d" % i for i in STREAM * 9) + b"\n\n", "text"),
    ],
    ids=["gzip", "zip", "zstd", "index", "text"],
)
def test_what_is_not_an_array_of_ids_is_named(data: Path, tmp_path: Path, content: bytes, named: str) -> None:
    (tmp_path / "train.bin").write_bytes(content[: len(content) // 2 * 2])
    with pytest.raises(DataError, match=named):
        adopt(tmp_path / "train", data / "tokenizer")


@pytest.mark.parametrize("dtype", ["u2", "i4"])
def test_documents_of_several_sequences_stay_whole(data: Path, tmp_path: Path, dtype: str) -> None:
    """Sentences of 2 + 2, 2, and 1 + 1 + 3 tokens, only the last of each ended."""
    documents = [[[5, 6], [7, 0]], [[8, 0]], [[9], [10], [11, 12, 0]]]
    write_megatron(tmp_path / "its", documents, dtype)
    manifest = adopt(tmp_path / "its", data / "tokenizer", valid_fraction=0.2)
    assert facts(manifest)[1] == [("train", 2, 6), ("valid", 1, 5)]
    assert manifest.documents["read"] == 3
    verify(tmp_path, deep=True)
    assert ids_of(tmp_path) == (STREAM[:6], STREAM[6:])
    (shown,) = inspect_sequence({tmp_path: 1.0}, "valid", 4, 0)
    assert (shown.document, shown.tokens) == (2, 5)


def test_empty_documents_are_counted_and_skipped(data: Path, tmp_path: Path) -> None:
    write_megatron(tmp_path / "its", [[[5, 6, 7, 0]], [], [[8, 0]], [[]], [[9, 10, 11, 12, 0]]])
    manifest = adopt(tmp_path / "its", data / "tokenizer", valid_fraction=0.3)
    assert facts(manifest)[1] == [("train", 2, 6), ("valid", 1, 5)]
    assert (manifest.documents["read"], manifest.documents["written"], manifest.documents["empty"]) == (5, 3, 2)
    verify(tmp_path, deep=True)


@pytest.mark.parametrize(
    "firsts",
    [[0, 2, 1, 3], [1, 2, 3, 3], [0, 1, 2, 2], [0, 1, 2, 9]],
    ids=["decreasing", "not from the first", "not to the last", "beyond the last"],
)
def test_an_index_with_impossible_documents_is_damaged(data: Path, tmp_path: Path, firsts: list[int]) -> None:
    write_megatron(tmp_path / "its", ended(BARE))
    index = (tmp_path / "its.idx").read_bytes()
    (tmp_path / "its.idx").write_bytes(index[:-32] + np.array(firsts, "<i8").tobytes())
    with pytest.raises(DataError, match=r"its.idx: .*document"):
        adopt(tmp_path / "its", data / "tokenizer")


@pytest.mark.parametrize(
    ("documents", "missing"), [([[d] for d in BARE], "3 of 3"), ([[[5, 6, 7, 0]], [[8]], [[9, 0]]], "1 of 3")]
)
def test_documents_without_end_tokens_are_refused(
    data: Path, tmp_path: Path, documents: list[list[list[int]]], missing: str
) -> None:
    write_megatron(tmp_path / "its", documents)
    with pytest.raises(DataError, match=rf"{missing} documents.*--append-eod.*--append-eos"):
        adopt(tmp_path / "its", data / "tokenizer")
    assert not (tmp_path / "manifest.json").exists()


def test_documents_that_end_with_another_id_show_another_tokenizer(data: Path, tmp_path: Path) -> None:
    write_megatron(tmp_path / "its", [[[*d, 300]] for d in BARE])
    with pytest.raises(DataError, match=r"all end with id 300.*--tokenizer"):
        adopt(tmp_path / "its", data / "tokenizer")


@pytest.mark.parametrize("dtype", ["i2", "i4", "i8", "u2"])
@pytest.mark.parametrize("mixed", [False, True])
def test_end_tokens_are_appended_to_a_copy(data: Path, tmp_path: Path, dtype: str, mixed: bool) -> None:
    documents = [[[5, 6], [7]], [[8, 0] if mixed else [8]], [[9, 10, 11, 12]]]
    write_megatron(tmp_path / "its", documents, dtype)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    out = tmp_path / "out"
    manifest = adopt(tmp_path / "its", data / "tokenizer", valid_fraction=0.3, append_eos=True, output=out)
    assert facts(manifest) == ("uint16", [("train", 2, 6), ("valid", 1, 5)])
    assert manifest.documents["end tokens appended"] == (2 if mixed else 3)
    assert Manifest.read(out).digest == manifest.digest
    verify(out, deep=True)
    assert ids_of(out) == (STREAM[:6], STREAM[6:])
    assert np.fromfile(out / "train-00000.bin", "<u2").tolist() == STREAM[:6]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    shown = inspect_sequence({out: 1.0}, "valid", 4, 0)[0]
    assert shown.provenance is not None
    assert (shown.provenance.repository, shown.provenance.path) == ("its", "document 2")


def test_end_tokens_cannot_tell_documents_apart_that_nothing_separates(data: Path, tmp_path: Path) -> None:
    np.array([5, 6, 7, 8], "<u2").tofile(tmp_path / "train.bin")
    with pytest.raises(DataError, match=r"no end token.*\.idx"):
        adopt(tmp_path / "train", data / "tokenizer", append_eos=True, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_validation_dataset_is_tested_like_the_other(data: Path, tmp_path: Path) -> None:
    train = write_megatron(tmp_path / "its", ended(BARE))
    valid = write_megatron(tmp_path / "valid", [[d] for d in BARE])
    with pytest.raises(DataError, match=r"valid\.bin: 3 of 3 documents"):
        adopt(train, data / "tokenizer", valid_prefix=valid)
    np.array(STREAM, "<u4").tofile(tmp_path / "wide.bin")
    with pytest.raises(DataError, match=r"int32.*uint16.*--output"):
        adopt(train, data / "tokenizer", valid_prefix=tmp_path / "wide")
    out = tmp_path / "out"
    manifest = adopt(train, data / "tokenizer", valid_prefix=valid, append_eos=True, output=out)
    assert facts(manifest) == ("uint16", [("train", 3, 11), ("valid", 3, 11)])
    assert manifest.documents["end tokens appended"] == 3
    verify(out, deep=True)


def test_end_tokens_in_front_of_documents_separate_them_too(data: Path, tmp_path: Path) -> None:
    """As llm.c writes them. The first end token ends nothing, and the last document has none."""
    np.array([0, 5, 6, 7, 0, 8, 0, 9, 10, 11, 12], "<u2").tofile(tmp_path / "train.bin")
    manifest = adopt(tmp_path / "train", data / "tokenizer", valid_fraction=0.3)
    assert facts(manifest)[1] == [("train", 2, 6), ("valid", 1, 4)]
    assert (manifest.documents["empty"], manifest.documents["without end token"]) == (1, 1)
    verify(tmp_path, deep=True)
    assert ids_of(tmp_path) == (STREAM[:6], STREAM[6:10])
    assert inspect_sequence({tmp_path: 1.0}, "valid", 3, 0)[0].document == 2
    out = tmp_path / "out"
    copied = adopt(tmp_path / "train", data / "tokenizer", valid_fraction=0.3, append_eos=True, output=out)
    assert facts(copied)[1] == [("train", 2, 6), ("valid", 1, 5)]
    assert ids_of(out) == (STREAM[:6], STREAM[6:])


@pytest.mark.parametrize("code", [0, 6, 7, 9])
def test_an_index_of_no_integers_is_refused(data: Path, tmp_path: Path, code: int) -> None:
    write_megatron(tmp_path / "its", ended(BARE))
    index = bytearray((tmp_path / "its.idx").read_bytes())
    index[17] = code
    (tmp_path / "its.idx").write_bytes(index)
    with pytest.raises(DataError, match=rf"dtype code {code}"):
        adopt(tmp_path / "its", data / "tokenizer")


@pytest.mark.parametrize("dtype", ["i2", "i8"])
def test_an_index_of_other_integers_is_adopted_as_a_copy(data: Path, tmp_path: Path, dtype: str) -> None:
    write_megatron(tmp_path / "its", ended(BARE), dtype)
    with pytest.raises(DataError, match=rf"{np.dtype(dtype).name}.*--output"):
        adopt(tmp_path / "its", data / "tokenizer")
    manifest = adopt(tmp_path / "its", data / "tokenizer", valid_fraction=0.3, output=tmp_path / "out")
    assert facts(manifest) == ("uint16", [("train", 2, 6), ("valid", 1, 5)])


def test_other_indices_are_named(data: Path, tmp_path: Path) -> None:
    write_megatron(tmp_path / "modes", ended(BARE), modes=True)
    with pytest.raises(DataError, match="multimodal"):
        adopt(tmp_path / "modes", data / "tokenizer")
    write_megatron(tmp_path / "old", ended(BARE))
    (tmp_path / "old.idx").write_bytes(b"TNTIDX\0\0" + bytes(80))
    with pytest.raises(DataError, match="TNTIDX"):
        adopt(tmp_path / "old", data / "tokenizer")
    write_megatron(tmp_path / "fairseq", ended(BARE))
    index = (tmp_path / "fairseq.idx").read_bytes()
    (tmp_path / "fairseq.idx").write_bytes(index[:26] + index[34:-32])  # neither the documents nor their number
    with pytest.raises(DataError, match="fairseq"):
        adopt(tmp_path / "fairseq", data / "tokenizer")
    write_megatron(tmp_path / "cut", ended(BARE))
    (tmp_path / "cut.idx").write_bytes((tmp_path / "cut.idx").read_bytes()[:-8])
    with pytest.raises(DataError, match="its header requires"):
        adopt(tmp_path / "cut", data / "tokenizer")


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "codeparrot_ds.cli", "shards", "adopt", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_the_command_appends_end_tokens(data: Path, tmp_path: Path) -> None:
    its = write_megatron(tmp_path / "its", [[d] for d in BARE])
    options: list[Any] = [its, "--tokenizer", data / "tokenizer", "--append-eos"]
    done = run(*options, "--valid-fraction", "0.3", "--output", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["tokens"] == {"train": 6, "valid": 5}
    assert result["documents"]["end tokens appended"] == 3
    again = run(*options, "--output", tmp_path / "out")
    assert (again.returncode, "already" in again.stderr) == (1, True), again.stderr
    here = run(*options, "--output", tmp_path)
    assert here.returncode == 1, here.stderr


def test_by_default_the_copy_is_next_to_the_dataset(data: Path, tmp_path: Path) -> None:
    its = write_megatron(tmp_path / "its", [[d] for d in BARE])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    manifest = adopt(its, data / "tokenizer", valid_fraction=0.3, append_eos=True)
    assert facts(manifest) == ("uint16", [("train", 2, 6), ("valid", 1, 5)])
    verify(tmp_path, deep=True)
    assert ids_of(tmp_path) == (STREAM[:6], STREAM[6:])
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    other = tmp_path / "other"
    other.mkdir()
    own = write_megatron(other / "train-00000", [[d] for d in BARE])
    with pytest.raises(ConfigError, match=r"train-00000.bin: already exists.*--output"):
        adopt(own, data / "tokenizer", append_eos=True)


def test_several_datasets_of_one_directory_are_adopted_as_one(data: Path, tmp_path: Path) -> None:
    tokenizer = data / "tokenizer"
    streams = {name: ended([[i, i + 1] for i in range(first, first + 9)]) for name, first in (("a", 20), ("b", 40))}
    for name, documents in streams.items():
        write_megatron(tmp_path / name, documents)
    write_megatron(tmp_path / "v", ended([[7, 8], [9]]))
    flat = {name: [i for document in documents for i in document[0]] for name, documents in streams.items()}
    prefixes = [tmp_path / "a.bin", tmp_path / "b"]
    manifest = adopt(prefixes, tokenizer, valid_fraction=0.3, output=tmp_path / "both")
    assert [shard.name for shard in manifest.shards] == ["train-00000", "train-00001", "valid-00000", "valid-00001"]
    train, valid = ids_of(tmp_path / "both")
    assert train[: len(train) // 2] + valid[: len(valid) // 2] == flat["a"], "of each, the end"
    assert train[len(train) // 2 :] + valid[len(valid) // 2 :] == flat["b"]
    manifest = adopt(prefixes, tokenizer, valid_prefix=tmp_path / "v")
    verify(tmp_path, deep=True)
    assert ids_of(tmp_path) == (flat["a"] + flat["b"], [7, 8, 0, 9, 0])
    assert manifest.inputs == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert manifest.valid_inputs == [str(tmp_path / "v")]
    write_megatron(tmp_path / "other", ended([[5], [6]]))
    with pytest.raises(ConfigError, match=r"is of other data in this directory \(a, b, v\).*--output DIR"):
        adopt(tmp_path / "other", tokenizer)
    with pytest.raises(ConfigError, match=r"already exists\. Remove it to adopt"):
        adopt(tmp_path / "b", tokenizer)
    with pytest.raises(ConfigError, match=r"other: named twice"):
        adopt([tmp_path / "other", tmp_path / "other.idx"], tokenizer, output=tmp_path / "c")
    with pytest.raises(ConfigError, match="both say what is validated on"):
        adopt(prefixes, tokenizer, valid_prefix=tmp_path / "v", valid_fraction=0.1, output=tmp_path / "c")


def test_a_dataset_of_one_document_is_not_split(data: Path, tmp_path: Path) -> None:
    write_megatron(tmp_path / "one", ended([[5, 6, 7]]))
    with pytest.raises(DataError, match=r"single document.*--valid-prefix, or do without one: --valid-fraction 0"):
        adopt(tmp_path / "one", data / "tokenizer")
    manifest = adopt(tmp_path / "one", data / "tokenizer", valid_fraction=0)
    assert (manifest.tokens("train"), manifest.split("valid"), manifest.options["valid_fraction"]) == (4, (), 0)
    write_megatron(tmp_path / "more", ended([[5], [6], [7]]))
    both = [tmp_path / "one", tmp_path / "more"]
    manifest = adopt(both, data / "tokenizer", valid_fraction=0.3, output=tmp_path / "out")
    assert (manifest.tokens("train"), manifest.tokens("valid")) == (8, 2)


def test_the_tokenizer_must_not_lose_text(tmp_path: Path) -> None:
    tokenizer = only_bytes(normalizer={"type": "Lowercase"})
    write_megatron(tmp_path / "its", ended([[5], [6], [7]]))
    with pytest.raises(DataError, match=r"normalizer Lowercase: makes capital letters small"):
        adopt(tmp_path / "its", save(tokenizer, tmp_path / "lossy"))
    assert not (tmp_path / MANIFEST).exists()
    changing = only_bytes(normalizer={"type": "NFC"})
    manifest = adopt(tmp_path / "its", save(changing, tmp_path / "nfc"), valid_fraction=0.3)
    assert manifest.options["text_changes"] == ["texts are normalized to NFC"]


def other_tokenizer_of(directory: Path, output: Path) -> Path:
    """A tokenizer with the same tokens under other ids: those of the merged tokens are reversed."""
    content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    merged = sorted(number for token, number in vocab.items() if len(token) > 1 and number > 4)
    other = dict(zip(merged, reversed(merged), strict=True))
    content["model"]["vocab"] = {token: other.get(number, number) for token, number in vocab.items()}
    return save(Tokenizer.from_str(json.dumps(content)), output)


@pytest.mark.parametrize("append_eos", [False, True])
def test_ids_of_another_tokenizer_of_the_same_size_are_refused(data: Path, tmp_path: Path, append_eos: bool) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(data / "shards" / f"train-00000{suffix}", tmp_path / f"its{suffix}")
    other = other_tokenizer_of(data / "tokenizer", tmp_path / "other")
    with pytest.raises(DataError, match=r"its\.bin: only \d+% of its ids are those that the tokenizer gives"):
        adopt(tmp_path / "its", other, append_eos=append_eos, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    adopt(tmp_path / "its", data / "tokenizer", append_eos=append_eos, output=tmp_path / "out")


def test_special_tokens_inside_documents_are_not_taken_for_text(data: Path, tmp_path: Path) -> None:
    """Ids of fill-in-the-middle: encoding the text of <fim_prefix> gives other ids, which says nothing."""
    encoder = Encoder(data / "tokenizer")
    line = encoder.encode("def area(width, height):\n    return width * height\n").tolist()
    write_megatron(tmp_path / "its", ended([[1, *line, 3, *line, 2, *line] * 3] * 40))
    tokens = open_tokens(tmp_path / "its", encoder)
    kept, compared = unchanged(tokens, encoder)
    assert kept == compared == 9 * 40 * len(line)
    adopt(tmp_path / "its", data / "tokenizer")


def test_a_prefix_without_what_megatron_adds_to_it_is_completed(data: Path, tmp_path: Path) -> None:
    write_megatron(tmp_path / "my_text_document", ended(BARE))
    with pytest.raises(DataError, match=rf"Did you mean {tmp_path}/my_text_document\?"):
        adopt(tmp_path / "my", data / "tokenizer")

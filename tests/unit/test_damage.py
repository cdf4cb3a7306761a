"""Damage is named for what it is, and takes no sound document with it."""

import bz2
import gzip
import json
import lzma
import os
import random
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from codeparrot_ds.documents.document import BadDocument, Document
from codeparrot_ds.documents.inputs import find_inputs
from codeparrot_ds.documents.read import read_documents
from codeparrot_ds.errors import DataError
from codeparrot_ds.shards.build import build
from codeparrot_ds.shards.format import Manifest
from codeparrot_ds.shards.options import BuildOptions

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": lambda data: gzip.compress(data, mtime=0),
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
LIBRARIES = {"gz": "gzip", "bz2": "bzip2", "xz": "xz", "zst": "zstandard"}


def texts(count: int = 300) -> list[str]:
    generator = random.Random(0)
    return [f"value_{n} = '{generator.randbytes(30).hex()}'\n" for n in range(count)]


def lines(count: int = 300) -> bytes:
    return b"".join(json.dumps({"content": text}).encode() + b"\n" for text in texts(count))


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def read_all(path: Path | str, text_field: str = "content") -> tuple[list[str], list[BadDocument]]:
    """Texts, and bad documents."""
    reads = [read for piece in find_inputs([str(path)]) for read in read_documents(piece, text_field)]
    return (
        [read.text for read in reads if isinstance(read, Document)],
        [read for read in reads if isinstance(read, BadDocument)],
    )


def make(data: Path, inputs: Any, output: Path, **how: Any) -> Manifest:
    manifest = build(inputs, data / "tokenizer", output, BuildOptions(valid_fraction=0.3, workers=1, **how))
    assert manifest is not None
    return manifest


def parquet(columns: dict[str, Any], **how: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, **how)
    return sink.getvalue().to_pybytes()


# Zstandard with a long window


def long_window(log: int, content: bytes) -> bytes:
    """As `zstd --long=LOG` of a stream, whose size is unknown at its start."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        3, window_log=log, enable_ldm=True, write_content_size=0, write_checksum=1
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(content) + compressor.flush()


@pytest.mark.parametrize("log", [27, 28, 30, 31])
def test_a_long_window_is_read(log: int, data: Path, tmp_path: Path) -> None:
    whole = long_window(log, lines())
    assert zstandard.get_frame_parameters(whole).window_size == 1 << log
    path = write(tmp_path / "a.jsonl.zst", whole)
    assert read_all(path) == (texts(), [])
    assert make(data, path, tmp_path / "shards").documents["written"] == 300


def test_a_long_window_behind_a_short_one_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.zst", zstandard.compress(lines()) + long_window(29, lines()))
    assert read_all(path) == (texts() * 2, [])


def test_a_truncated_long_window_is_noticed(tmp_path: Path) -> None:
    whole = long_window(28, lines())
    for cut in (1, 3, 4, 5, 6, len(whole) // 2, len(whole) - 5, len(whole) - 1):
        found, bad = read_all(write(tmp_path / "a.jsonl.zst", whole[:cut]))
        assert found == texts()[: len(found)]
        assert len(bad) == 1 and "ends too early" in bad[0].reason, cut


# What follows the compressed data


@pytest.mark.parametrize("suffix", COMPRESS)
def test_trailing_junk_costs_no_document(suffix: str, data: Path, tmp_path: Path) -> None:
    path = write(tmp_path / f"a.jsonl.{suffix}", COMPRESS[suffix](lines()[:-1]) + b"junk!")
    found, (bad,) = read_all(path)
    assert found == texts()
    assert bad.where == str(path)
    assert bad.reason.startswith(f"5 bytes after the end of the {LIBRARIES[suffix]} data are not part of it")
    assert "the documents in front of them are complete" in bad.reason
    assert "copy it again" not in bad.reason and "damaged" not in bad.reason
    with pytest.raises(DataError, match="5 bytes after the end"):
        make(data, path, tmp_path / "shards")
    manifest = make(data, path, tmp_path / "shards", on_bad_document="skip")
    assert manifest.documents == {"read": 301, "written": 300, "empty": 0, "quarantined": 1}


@pytest.mark.parametrize("size", [1, 4, 512, 1 << 18])
def test_padding_with_zeros_is_told_from_junk(size: int, tmp_path: Path) -> None:
    for suffix, compress in COMPRESS.items():
        found, bad = read_all(write(tmp_path / f"a.jsonl.{suffix}", compress(lines()) + bytes(size)))
        assert found == texts()
        if suffix in ("gz", "xz"):  # their own tools ignore it
            assert bad == []
        else:
            assert bad[0].reason.startswith(f"{size:,} bytes after the end") and "(zeros)" in bad[0].reason


def test_junk_that_is_something_is_named(tmp_path: Path) -> None:
    _, (bad,) = read_all(write(tmp_path / "a.jsonl.gz", gzip.compress(lines()) + zstandard.compress(b"x")))
    assert "(zstandard)" in bad.reason


# Damage in the middle


@pytest.mark.parametrize("suffix", COMPRESS)
def test_documents_in_front_of_damage_are_kept(suffix: str, data: Path, tmp_path: Path) -> None:
    first, second = COMPRESS[suffix](lines()), COMPRESS[suffix](lines())
    at = len(second) // 2
    path = write(tmp_path / f"a.jsonl.{suffix}", first + second[:at] + bytes(40) + second[at + 40 :])
    found, bad = read_all(path)
    assert found[:300] == texts()
    after = re.match(rf"damaged {LIBRARIES[suffix]} data after line (\d+) \(.+\); copy the file again", bad[-1].reason)
    assert after and int(after[1]) >= 300, bad[-1].reason
    manifest = make(data, path, tmp_path / "shards", on_bad_document="skip")
    assert manifest.documents["written"] == len(found)


@pytest.mark.parametrize("suffix", ["gz", "xz"])  # the others compress larger blocks, which are lost as a whole
def test_documents_in_front_of_damage_to_the_only_stream_are_kept(suffix: str, tmp_path: Path) -> None:
    whole = COMPRESS[suffix](lines())
    at = len(whole) // 2
    found, bad = read_all(write(tmp_path / f"a.jsonl.{suffix}", whole[:at] + bytes(40) + whole[at + 40 :]))
    assert found[:100] == texts()[:100]
    assert bad[-1].reason.startswith(f"damaged {LIBRARIES[suffix]} data after line ")


def test_a_truncated_file_gives_what_it_holds(tmp_path: Path) -> None:
    whole = gzip.compress(lines(), mtime=0)
    for cut in (len(whole) // 3, len(whole) // 2, len(whole) - 1):
        held = zlib.decompressobj(31).decompress(whole[:cut])  # independent of the reader
        found, (bad,) = read_all(write(tmp_path / "a.jsonl.gz", whole[:cut]))
        assert found == texts()[: held.count(b"\n")]
        assert len(found) > 50
        assert bad.reason.startswith(f"damaged gzip data after line {len(found)}: the file ends too early")


@pytest.mark.parametrize("suffix", COMPRESS)
def test_no_cut_and_no_flipped_byte_passes_unnoticed(suffix: str, tmp_path: Path) -> None:
    whole = COMPRESS[suffix](lines(6))
    for at in range(1, len(whole)):
        assert read_all(write(tmp_path / f"a.jsonl.{suffix}", whole[:at]))[1], f"cut at {at}"
    for at in range(len(whole)):
        flipped = whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]
        found, bad = read_all(write(tmp_path / f"a.jsonl.{suffix}", flipped))
        assert bad or found == texts(6), f"byte {at}"


# Content that is not what the name says


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", COMPRESS["gz"](b"{}"), "but gzip. Correct its name"),
        ("a.jsonl", zstandard.compress(b"{}"), "but zstandard. Correct its name"),
        ("a.jsonl", lines().decode().encode("utf-16"), "but text in UTF-16 or UTF-32. convert it to UTF-8"),
        ("a.csv", "content\nx\n".encode("utf-16"), "but text in UTF-16"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("a.jsonl", b"<!DOCTYPE html><title>404</title>\n", "an HTML page"),
        ("a.jsonl.gz", lines(), "not gzip, which its name promises, but text"),
        ("a.jsonl.gz", bz2.compress(lines()), "not gzip, which its name promises, but bzip2"),
        ("a.jsonl.gz", COMPRESS["gz"](COMPRESS["gz"](lines())), "not text in UTF-8, which its name promises, but gzip"),
        ("a.jsonl.xz", COMPRESS["gz"](lines()), "not xz, which its name promises, but gzip"),
        ("a.jsonl.zst", b"", ""),
        ("a.parquet", COMPRESS["gz"](b"x"), "not parquet, which its name promises, but gzip"),
        ("a.jsonl", parquet({"content": ["x"]}), "but parquet"),
    ],
)
def test_a_wrong_name_is_told_from_damage(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    found, bad = read_all(write(tmp_path / name, content))
    assert found == []
    assert len(bad) == bool(said)
    if bad:
        assert said in bad[0].reason and "damaged" not in bad[0].reason


# Parquet


def _with_damaged_page() -> bytes:
    """Four groups of 50 rows; the column of the third is overwritten."""
    whole = bytearray(parquet({"content": texts(200)}, row_group_size=50, compression="zstd", use_dictionary=False))
    chunk = pq.ParquetFile(pa.BufferReader(bytes(whole))).metadata.row_group(2).column(0)
    middle = chunk.data_page_offset + chunk.total_compressed_size // 2
    whole[middle : middle + 200] = bytes(200)
    return bytes(whole)


def test_a_damaged_row_group_costs_its_own_rows(data: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", _with_damaged_page())
    found, (bad,) = read_all(path)
    assert found == texts(200)[:100] + texts(200)[150:]
    assert bad.where == f"{path} rows 101 to 150"
    manifest = make(data, path, tmp_path / "shards", on_bad_document="skip")
    assert manifest.documents == {"read": 200, "written": 150, "empty": 0, "quarantined": 50}
    (listed,) = map(json.loads, (tmp_path / "shards" / "quarantine.jsonl").read_text().splitlines())
    assert listed["documents"] == 50


def test_a_table_without_the_column_counts_its_rows(data: Path, tmp_path: Path) -> None:
    write(tmp_path / "d" / "a.parquet", parquet({"text": texts(70)}, row_group_size=20))
    write(tmp_path / "d" / "b.jsonl", lines(40))
    for tokens in (1_000_000, 300):
        shards = tmp_path / f"shards-{tokens}"
        manifest = make(data, tmp_path / "d", shards, on_bad_document="skip", shard_tokens=tokens)
        assert manifest.documents == {"read": 110, "written": 40, "empty": 0, "quarantined": 70}


def test_a_damaged_column_that_is_not_used_costs_nothing(tmp_path: Path) -> None:
    columns = {"content": texts(50), "unused": [os.urandom(50) for _ in range(50)]}
    whole = bytearray(parquet(columns, compression="zstd", use_dictionary=False))
    chunk = pq.ParquetFile(pa.BufferReader(bytes(whole))).metadata.row_group(0).column(1)
    whole[chunk.data_page_offset : chunk.data_page_offset + chunk.total_compressed_size] = bytes(
        chunk.total_compressed_size
    )
    assert read_all(write(tmp_path / "a.parquet", bytes(whole))) == (texts(50), [])


# Datasets


def _types_change_within(root: Path) -> None:
    rows = [{"content": text, "unused": n if n % 2 else [str(n)]} for n, text in enumerate(texts())]
    write(root / "train.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in rows))


def _types_change_between(root: Path) -> None:
    for number, unused in enumerate((1, "text", [1], {"a": 1})):
        part = texts()[75 * number : 75 * number + 75]
        rows = [{"content": text, "unused": unused} for text in part]
        write(root / f"train-{number}.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in rows))


def _types_change_late(root: Path) -> None:
    """After more than the 10 MB that `datasets` takes the types from."""
    rows = [{"content": text, "unused": "x" * 50_000 if n < 290 else {"deep": [n]}} for n, text in enumerate(texts())]
    write(root / "train.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in rows))


def _parquet_types_change(root: Path) -> None:
    for number, unused in enumerate((1, "text", [1])):
        part = texts()[100 * number : 100 * number + 100]
        write(root / f"train-{number}.parquet", parquet({"content": part, "unused": [unused] * 100}))


def _csv_types_change(root: Path) -> None:
    rows = [f'"{text}",{n if n < 150 else "word"}\n' for n, text in enumerate(texts())]
    write(root / "train.csv", "".join(["content,unused\n", *rows]).encode())


DATASETS = [_types_change_within, _types_change_between, _types_change_late, _parquet_types_change, _csv_types_change]


@pytest.mark.parametrize("fill", DATASETS)
def test_the_type_of_an_unused_column_may_change(fill: Callable[[Path], None], data: Path, tmp_path: Path) -> None:
    fill(tmp_path / "set")
    assert read_all(f"hub:{tmp_path / 'set'}") == (texts(), [])
    assert read_all(tmp_path / "set") == (texts(), [])


def test_a_bad_row_of_a_dataset_is_one_bad_document(data: Path, tmp_path: Path) -> None:
    write(tmp_path / "set" / "train.jsonl", lines(40) + b'{"content": 7}\nnot JSON\n' + lines(40))
    address = f"hub:{tmp_path / 'set'}"
    with pytest.raises(DataError, match=r"part 0 example 41: not a document: .*train\.jsonl:41") as caught:
        make(data, address, tmp_path / "shards")
    assert "network" not in str(caught.value)
    manifest = make(data, address, tmp_path / "shards", on_bad_document="skip")
    assert manifest.documents == {"read": 82, "written": 80, "empty": 0, "quarantined": 2}


def test_a_damaged_file_of_a_dataset_is_not_the_networks_fault(data: Path, tmp_path: Path) -> None:
    write(tmp_path / "set" / "train.jsonl.gz", gzip.compress(lines(40))[:-20])
    with pytest.raises(DataError, match="damaged gzip data") as caught:
        make(data, f"hub:{tmp_path / 'set'}", tmp_path / "shards")
    assert "network" not in str(caught.value)


def test_what_is_not_in_files_of_ours_is_streamed(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with pa.OSFile(str(tmp_path / "set" / "train.arrow"), "wb") as file:
        table = pa.table({"content": texts(), "unused": list(range(300))})
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    assert read_all(f"hub:{tmp_path / 'set'}") == (texts(), [])

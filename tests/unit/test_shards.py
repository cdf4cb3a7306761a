"""Shards: format checked with an independent reader, determinism, verification."""

import dataclasses
import json
import shutil
import struct
from pathlib import Path

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from codeparrot_ds.documents.document import BadDocument, Document
from codeparrot_ds.documents.fields import Fields
from codeparrot_ds.documents.inputs import Corpus, find_inputs
from codeparrot_ds.documents.splits import split_of
from codeparrot_ds.errors import ConfigError, DataError
from codeparrot_ds.shards.build import build
from codeparrot_ds.shards.format import Manifest, ShardInfo, ShardWriter, dtype_for, read_index
from codeparrot_ds.shards.options import BuildOptions
from codeparrot_ds.shards.sequences import PackedSequences, batch_digest
from codeparrot_ds.shards.tasks import Job, Receipt, Task, plan, read_receipt
from codeparrot_ds.shards.verify import _check_bytes, verify
from codeparrot_ds.system.files import MANIFEST, exclusive_lock
from codeparrot_ds.system.storage import LocalDirectory
from codeparrot_ds.tokenizer.encode import Encoder


def read_megatron(prefix: Path) -> list[np.ndarray]:
    """Every sequence of a Megatron-LM dataset, read by code based on the public description, not ours."""
    index = prefix.with_suffix(".idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, documents = struct.unpack("<QBQQ", index[9:34])
    assert version == 1
    dtype = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}[code]
    lengths = np.frombuffer(index, "<i4", sequences, 34)
    pointers = np.frombuffer(index, "<i8", sequences, 34 + 4 * sequences)
    bounds = np.frombuffer(index, "<i8", documents, 34 + 12 * sequences)
    assert len(index) == 34 + 12 * sequences + 8 * documents
    assert bounds.tolist() == list(range(sequences + 1))  # one sequence per document
    data = prefix.with_suffix(".bin").read_bytes()
    return [np.frombuffer(data, dtype, n, offset) for n, offset in zip(lengths, pointers, strict=True)]


def test_an_independent_reader_finds_every_document_in_order(data: Path) -> None:
    encoder = Encoder(data / "tokenizer")
    manifest = Manifest.read(data / "shards")
    found = {split: [] for split in ("train", "valid")}
    for shard in manifest.shards:
        documents = read_megatron(data / "shards" / shard.name)
        provenance = pq.read_table(data / "shards" / f"{shard.name}.docs.parquet").to_pylist()
        assert len(documents) == shard.documents == len(provenance)
        assert sum(map(len, documents)) == shard.tokens
        found[shard.split] += list(zip(documents, provenance, strict=True))
    corpus = list(Corpus.open(data / "corpus"))
    assert len(corpus) == sum(map(len, found.values()))
    for split, rows in found.items():
        expected = [document for document in corpus if split_of(document, 0.1) == split]
        for document, (ids, where) in zip(expected, rows, strict=True):
            assert ids[-1] == encoder.eos_id
            assert encoder.decode(ids[:-1]) == document.text
            assert (where["repository"], where["path"]) == (document.repository, document.path)
            assert (where["licence"], where["source"]) == (document.licence, document.source)


@pytest.mark.parametrize(("vocab_size", "name"), [(8192, "uint16"), (65_499, "uint16"), (65_500, "int32")])
def test_ids_are_16_bit_while_the_vocabulary_fits(tmp_path: Path, vocab_size: int, name: str) -> None:
    dtype = dtype_for(vocab_size)
    assert dtype.name == name
    ids = [np.array([1, vocab_size - 1, 0]), np.array([0])]
    write_shard(tmp_path, "train-00000", ids, dtype)
    assert [a.tolist() for a in read_megatron(tmp_path / "train-00000")] == [a.tolist() for a in ids]
    assert read_index(tmp_path / "train-00000.idx").lengths.tolist() == [3, 1]
    assert not list(tmp_path.glob(".*"))


def write_shard(directory: Path, name: str, documents: list[np.ndarray], dtype: np.dtype) -> ShardInfo:
    """Path of a shard; its name starts with the split."""
    with LocalDirectory(directory).scratch() as scratch:
        writer = ShardWriter(scratch, name, name.partition("-")[0], dtype)
        for ids in documents:
            writer.append(ids.astype(dtype), np.array([len(ids)]), [Document("x", "r", "p", "", "")])
        info = writer.finish()
        LocalDirectory(directory).publish(writer.files)
    assert info is not None
    return info


def files_of(directory: Path) -> dict[str, bytes]:
    """All files but the record of the input's modification times."""
    files = {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    del files["inputs.json"]
    return files


def test_the_bytes_do_not_depend_on_workers_or_interruptions(data: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(data / "corpus", corpus)
    _split_corpus(corpus, 3)
    one = build(
        corpus, data / "tokenizer", tmp_path / "one", BuildOptions(shard_tokens=1, valid_fraction=0.1, workers=1)
    )
    assert len(one.split("train")) == 3
    build(corpus, data / "tokenizer", tmp_path / "two", BuildOptions(shard_tokens=1, valid_fraction=0.1, workers=2))
    # Interrupted: two tasks done, the third half written, no manifest.
    broken = tmp_path / "broken"
    with pytest.raises(DataError):
        _build_with_damaged_last_file(corpus, data / "tokenizer", broken)
    assert not (broken / MANIFEST).exists()
    build(corpus, data / "tokenizer", broken, BuildOptions(shard_tokens=1, valid_fraction=0.1, workers=1))
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two") == files_of(broken)


def test_leftovers_of_a_build_with_other_options_are_not_used(data: Path, tmp_path: Path) -> None:
    """Three builds, two of them interrupted: a receipt must not outlive its shards."""
    output = tmp_path / "shards"
    manifest = build(data / "corpus", data / "tokenizer", output, BuildOptions(valid_fraction=0.1, workers=1))
    assert manifest is not None
    receipt = {
        "fingerprint": "of the first build",
        "encoder": Encoder(data / "tokenizer").label,
        "shards": [dataclasses.asdict(shard) for shard in manifest.shards],
        "read": 10,
        "empty": 0,
        "quarantined": [],
    }
    (output / ".task-00000.json").write_text(json.dumps(receipt))
    (output / MANIFEST).unlink()
    build(data / "corpus", data / "tokenizer", output, BuildOptions(valid_fraction=0.3, workers=1))
    verify(output, deep=True)
    assert not list(output.glob(".*"))


def test_two_builds_at_once_are_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    with (
        exclusive_lock(tmp_path / "shards" / ".lock", ""),
        pytest.raises(ConfigError, match="another process is building shards here"),
    ):
        build(data / "corpus", data / "tokenizer", tmp_path / "shards", BuildOptions(valid_fraction=0.1, workers=1))


def _split_corpus(corpus: Path, parts: int) -> None:
    """Distribute the documents of a one-file corpus over `parts` files."""
    import gzip

    manifest = json.loads((corpus / MANIFEST).read_text())
    lines = [document.to_json() for document in Corpus.open(corpus)]
    files = []
    for part in range(parts):
        content = gzip.compress("".join(lines[part::parts]).encode(), mtime=0)
        (corpus / f"part-{part}.jsonl.gz").write_bytes(content)
        files.append({"name": f"part-{part}.jsonl.gz", "bytes": len(content)})
    (corpus / MANIFEST).write_text(json.dumps({**manifest, "files": files}))


def _build_with_damaged_last_file(corpus: Path, tokenizer: Path, output: Path) -> None:
    last = corpus / "part-2.jsonl.gz"
    good = last.read_bytes()
    damaged = bytearray(good)
    damaged[len(good) // 2 :] = bytes(len(good) - len(good) // 2)  # the same size, so that opening does not detect it
    last.write_bytes(damaged)
    try:
        build(corpus, tokenizer, output, BuildOptions(shard_tokens=1, valid_fraction=0.1, workers=1))
    finally:
        last.write_bytes(good)


def test_copies_never_straddle_the_split() -> None:
    documents = [Document(f"text {n}", f"repo{n % 7}", f"{n}.py", "", "") for n in range(2_000)]
    valid = [d for d in documents if split_of(d, 0.1) == "valid"]
    assert 140 < len(valid) < 260
    for document in valid:
        copy = Document(document.text, "elsewhere", "copy.py", "MIT", "")
        assert split_of(copy, 0.1) == "valid"


def test_a_sampled_corpus_keeps_the_validation_share() -> None:
    """Sampling takes the smallest digests, so the split must use the other end of them."""
    documents = sorted((Document(f"text {n}", "", "", "", "") for n in range(8_000)), key=Document.digest)
    valid = [d for d in documents[:2_000] if split_of(d, 0.1) == "valid"]
    assert 140 < len(valid) < 260


def test_finished_shards_are_kept_and_others_are_refused(data: Path, tmp_path: Path) -> None:
    build(data / "corpus", data / "tokenizer", tmp_path / "s", BuildOptions(valid_fraction=0.1, workers=1))
    before = (tmp_path / "s" / MANIFEST).stat().st_mtime_ns
    build(data / "corpus", data / "tokenizer", tmp_path / "s", BuildOptions(valid_fraction=0.1, workers=1))
    assert (tmp_path / "s" / MANIFEST).stat().st_mtime_ns == before
    with pytest.raises(DataError, match="built with different options"):
        build(data / "corpus", data / "tokenizer", tmp_path / "s", BuildOptions(valid_fraction=0.2, workers=1))
    with pytest.raises(ConfigError, match="must be at least 0 and less than 1"):
        build(data / "corpus", data / "tokenizer", tmp_path / "s", BuildOptions(valid_fraction=1.5))


@pytest.fixture
def shards(data: Path, tmp_path: Path) -> Path:
    return shutil.copytree(data / "shards", tmp_path / "shards")


def test_complete_shards_pass(shards: Path) -> None:
    assert verify(shards, deep=True).tokens("train") > 10_000


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".docs.parquet"])
def test_a_flipped_byte_is_found_and_named(shards: Path, suffix: str) -> None:
    path = shards / f"train-00000{suffix}"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    verify(shards)  # sizes cannot tell
    with pytest.raises(DataError, match=path.name):
        verify(shards, deep=True)


def test_an_id_beyond_the_vocabulary_is_found(tmp_path: Path) -> None:
    ids = np.array([5, 299, 300], "<u2")
    for vocab_size, fits in ((301, True), (300, False)):
        shard = write_shard(tmp_path, f"train-{vocab_size:05d}", [ids], np.dtype("<u2"))
        manifest = Manifest(tmp_path, vocab_size, 0, "", "uint16", (shard,))
        found = _check_bytes(LocalDirectory(tmp_path), manifest, shard)
        assert found == [] if fits else "contains id 300, the vocabulary ends at 300" in found[0]


def test_missing_and_truncated_files_are_all_named(shards: Path) -> None:
    (shards / "train-00000.idx").unlink()
    path = shards / "valid-00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"(?s)train-00000\.idx is missing.*valid-00000\.bin") as caught:
        verify(shards)
    assert str(caught.value).count("valid-00000") == 1


def test_two_shards_that_were_swapped_are_found(tmp_path: Path, data: Path) -> None:
    corpus = shutil.copytree(data / "corpus", tmp_path / "corpus")
    _split_corpus(corpus, 2)
    shards = tmp_path / "shards"
    build(corpus, data / "tokenizer", shards, BuildOptions(shard_tokens=1, valid_fraction=0.1, workers=1))
    manifest = json.loads((shards / MANIFEST).read_text())
    first, second = (shards / f"train-0000{n}.bin" for n in (0, 1))
    content = first.read_bytes(), second.read_bytes()
    first.write_bytes(content[1])
    second.write_bytes(content[0])
    sizes = {f"train-0000{n}": len(content[1 - n]) for n in (0, 1)}  # even where sizes cannot tell
    for shard in manifest["shards"]:
        shard["files"][".bin"]["bytes"] = sizes.get(shard["name"], shard["files"][".bin"]["bytes"])
    (shards / MANIFEST).write_text(json.dumps(manifest))
    verify(shards)
    with pytest.raises(DataError, match=r"(?s)train-00000\.bin.*train-00001\.bin"):
        verify(shards, deep=True)


def test_another_tokenizer_or_none_is_found(shards: Path, data: Path) -> None:
    (shards / "tokenizer" / "tokenizer.json").write_text(
        (data / "tokenizer" / "tokenizer.json").read_text().replace('"id": 0', '"id":  0')
    )
    with pytest.raises(DataError, match="not the tokenizer that these shards were built with"):
        verify(shards)
    (shards / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json is missing"):
        verify(shards)


def test_a_stale_or_foreign_manifest_is_refused(shards: Path) -> None:
    (shards / MANIFEST).write_text('{"kind": "corpus"}')
    with pytest.raises(DataError, match="a manifest of 'corpus'; expected 'shards'"):
        verify(shards)
    (shards / MANIFEST).write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        verify(shards)


# In the second, sequences end with a shard, and the tokens fill whole sequences except for the last target.
@pytest.mark.parametrize("lengths", [(10, 1, 57, 33), (16, 8, 72)])
def test_packed_sequences_use_every_token_once_across_shards(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    pieces = [rng.integers(0, 300, n).astype("<u2") for n in lengths]
    infos = []
    for number, ids in enumerate(pieces):
        infos.append(write_shard(tmp_path, f"train-{number:05d}", [ids], np.dtype("<u2")))
    manifest = Manifest(tmp_path, 300, 0, "", "uint16", tuple(infos))
    stream = np.concatenate(pieces)
    packed = PackedSequences(manifest, "train", 8)
    count = {101: 12, 96: 11}[len(stream)]
    assert len(packed) == count
    expected = [stream[i * 8 : i * 8 + 9].tolist() for i in range(count)]
    assert [packed.read(i).tolist() for i in range(count)] == expected
    for numbers in ([3, 0], range(count), reversed(range(count))):
        order = np.array(list(numbers))
        batch = packed.batch(order)
        assert batch.dtype == np.int64
        assert batch.tolist() == [expected[i] for i in order]
    for number in (-1, count):
        with pytest.raises(IndexError):
            packed.read(number)
        with pytest.raises(IndexError):
            packed.batch(np.array([number]))
    with pytest.raises(DataError, match="fewer than one sequence"):
        PackedSequences(manifest, "train", 200)


def test_the_batch_digest_depends_on_content_and_not_on_its_distribution() -> None:
    ids = np.arange(40).reshape(4, 10)
    whole = batch_digest(ids)
    assert (batch_digest(ids[:1]) + batch_digest(ids[1:])) % 2**64 == whole
    assert batch_digest(ids[::-1]) == whole
    changed = ids.copy()
    changed[2, 3] += 1
    assert batch_digest(changed) != whole


def test_what_was_built_before_a_bad_document_is_kept_when_it_is_skipped(data: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"content": "first = 1"}\n' * 3)
    (tmp_path / "in" / "b.jsonl").write_text('{"content": "second = 2"}\nbroken\n')
    how = {"shard_tokens": 1, "valid_fraction": 0.0, "workers": 1}  # a task for each file
    shards = tmp_path / "shards"
    with pytest.raises(DataError, match=r"b\.jsonl at byte 26"):
        build(tmp_path / "in", data / "tokenizer", shards, BuildOptions(**how))
    built = (shards / "train-00000.bin").stat()
    manifest = build(tmp_path / "in", data / "tokenizer", shards, BuildOptions(on_bad_document="skip", **how))
    assert manifest is not None
    assert manifest.documents["quarantined"] == 1
    after = (shards / "train-00000.bin").stat()
    assert (after.st_ino, after.st_mtime_ns) == (built.st_ino, built.st_mtime_ns)


def test_a_receipt_of_skipped_documents_is_of_no_use_if_they_end_the_build(data: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "first = 1"}\nbroken\n')
    store = LocalDirectory(tmp_path)
    pieces = find_inputs([str(tmp_path / "a.jsonl")])
    task = plan(pieces, [], 1000)[0]
    job = Job(store, data / "tokenizer", "digest", None, "<|endoftext|>", Fields(), 0.0, True, "tokenizers")
    lenient, strict = Task(task, job), Task(task, msgspec.structs.replace(job, skip_bad=False))
    bad = BadDocument("a.jsonl:2", "not JSON")
    receipt = Receipt(lenient.fingerprint, "label", [], 2, 0, [bad])
    store.write(lenient.receipt, msgspec.json.encode(receipt))
    assert read_receipt(lenient, {"label"}) == receipt
    assert read_receipt(strict, {"label"}) is None
    store.write(lenient.receipt, msgspec.json.encode(msgspec.structs.replace(receipt, read=1, quarantined=[])))
    assert read_receipt(strict, {"label"}) is not None

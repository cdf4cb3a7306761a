"""Shards from and to an object store (a real S3 client against moto on loopback), and from a streamed Hub dataset."""

import io
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from codeparrot_ds.documents.document import Document
from codeparrot_ds.documents.inputs import find_inputs
from codeparrot_ds.documents.read import read_documents
from codeparrot_ds.shards.verify import verify
from codeparrot_ds.system.files import MANIFEST
from tests.conftest import ROOT
from tests.shard_commands import Corpus, Done, environment, error_of, files_of, shards, write_corpus

QUICKLY = 45  # seconds: allows for some of the client's own retries, but not for minutes of them
KEYS = {
    "AWS_ACCESS_KEY_ID": "a-key",
    "AWS_SECRET_ACCESS_KEY": "a-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}


@pytest.fixture(scope="module")
def corpus(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Eight tasks."""
    return write_corpus(tmp_path_factory.mktemp("small") / "corpus", data / "tokenizer", 200, 40)


@pytest.fixture(scope="module")
def whole(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of `corpus`, built locally."""
    output = tmp_path_factory.mktemp("whole") / "shards"
    done = shards(*corpus.command(output, "--workers", "1"))
    assert done.returncode == 0, done.stderr
    return files_of(output)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


class Store:
    """Buckets of the server, read by a separate client."""

    def __init__(self, endpoint: str) -> None:
        self.environment = {**KEYS, "AWS_ENDPOINT_URL": endpoint}
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            aws_access_key_id="a-key",
            aws_secret_access_key="a-secret",
        )

    def put(self, bucket: str, name: str, data: bytes) -> None:
        self.client.put_object(Bucket=bucket, Key=name, Body=data)

    def get(self, bucket: str, name: str) -> bytes:
        return bytes(self.client.get_object(Bucket=bucket, Key=name)["Body"].read())

    def files(self, bucket: str, prefix: str) -> dict[str, bytes]:
        listed = self.client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/").get("Contents", [])
        return {entry["Key"].removeprefix(f"{prefix}/"): self.get(bucket, entry["Key"]) for entry in listed}

    def writes(self, bucket: str, name: str) -> int:
        """Number of times an object has been written."""
        versions = self.client.list_object_versions(Bucket=bucket, Prefix=name).get("Versions", [])
        return sum(version["Key"] == name for version in versions)

    def buckets(self) -> set[str]:
        return {bucket["Name"] for bucket in self.client.list_buckets()["Buckets"]}

    def shards(self, *arguments: str | Path, **more: str) -> Done:
        """Run a command with this store in its environment."""
        return shards(*arguments, timeout=QUICKLY, **{**self.environment, **more})


@pytest.fixture
def store(endpoint: str, corpus: Corpus) -> Iterator[Store]:
    """A versioned bucket with only the corpus, below input/."""
    store = Store(endpoint)
    store.client.create_bucket(Bucket="bucket")
    store.client.put_bucket_versioning(Bucket="bucket", VersioningConfiguration={"Status": "Enabled"})
    for path in corpus.inputs:
        store.put("bucket", f"input/{path.name}", path.read_bytes())
    yield store
    for bucket in store.buckets():
        for listed in ("Versions", "DeleteMarkers"):
            for entry in store.client.list_object_versions(Bucket=bucket).get(listed, []):
                store.client.delete_object(Bucket=bucket, Key=entry["Key"], VersionId=entry["VersionId"])
        store.client.delete_bucket(Bucket=bucket)


def remote(corpus: Corpus, *inputs: str) -> Corpus:
    """The same corpus at another location; `Path` would remove a slash from a URL."""
    return replace(corpus, inputs=list(inputs))  # type: ignore[arg-type]


def same_but_inputs(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    """Check for equal names and bytes; manifests may name their inputs differently."""
    assert sorted(found) == sorted(expected)
    for name in expected.keys() - {MANIFEST, "quarantine.jsonl", "inputs.json"}:
        assert found[name] == expected[name], name
    ours, theirs = (json.loads(files[MANIFEST]) for files in (found, expected))
    del ours["inputs"], theirs["inputs"]
    assert ours == theirs
    ours, theirs = (
        [{**json.loads(line), "where": ""} for line in files["quarantine.jsonl"].splitlines()]
        for files in (found, expected)
    )
    assert ours == theirs


# S3

INPUTS = ["s3://bucket/input/plain.jsonl", "s3://bucket/input/packed.jsonl.gz"]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_store_gets_the_names_and_bytes_of_a_local_build(
    store: Store, corpus: Corpus, whole: dict[str, bytes], workers: str
) -> None:
    done = store.shards(*corpus.command("s3://bucket/shards", "--workers", workers))
    assert done.returncode == 0, done.stderr
    assert store.files("bucket", "shards") == whole
    done = store.shards(*remote(corpus, *INPUTS).command("s3://bucket/both", "--workers", workers))
    assert done.returncode == 0, done.stderr
    same_but_inputs(store.files("bucket", "both"), whole)


@pytest.mark.parametrize("argument", ["s3://bucket/input", "s3://bucket/input/", "s3://bucket/input/*.jsonl*"])
def test_a_prefix_and_a_glob_name_the_same_input_as_a_directory(
    store: Store, corpus: Corpus, tmp_path: Path, argument: str
) -> None:
    local = replace(corpus, inputs=[corpus.inputs[0].parent])
    for each, output in ((local, "local"), (remote(corpus, argument), "remote")):
        done = store.shards(*each.command(tmp_path / output, "--workers", "2"))
        assert done.returncode == 0, done.stderr
    same_but_inputs(files_of(tmp_path / "remote"), files_of(tmp_path / "local"))


@pytest.mark.parametrize("argument", ["s3://bucket/mixed", "s3://bucket/mixed/*"])
def test_a_store_and_a_directory_leave_out_the_same(
    store: Store, corpus: Corpus, tmp_path: Path, argument: str
) -> None:
    files = {
        "a.jsonl": b'{"content": "a = 1"}\n' * 20 + b'{"content": "b = 2"}\n' * 20,
        "below/b.csv": b"content\n" + b"".join(b"value_%d\n" % n for n in range(40)),
        "c.zip": zipped({"d.jsonl": b'{"content": "zipped"}\n', "notes.txt": b""}),
        "notes.txt": b"no",
        "manifest.json": b"{}",
        ".hidden.jsonl": b"no",
        ".cache/x.jsonl": b"no",
        ".cache/y.jsonl": b"no",
        "node_modules/z.jsonl": b"no",
        "below/.hidden/z.jsonl": b"no",
        "below/tar.jsonl.lz4": b"no",
    }
    for name, content in files.items():
        store.put("bucket", f"mixed/{name}", content)
        path = tmp_path / "mixed" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    local = str(tmp_path / "mixed") + ("/*" if argument.endswith("*") else "")
    for each, output in ((argument, "remote"), (local, "local")):
        done = store.shards(*remote(corpus, each).command(tmp_path / output, "--workers", "1"))
        assert done.returncode == 0, done.stderr
    found, expected = files_of(tmp_path / "remote"), files_of(tmp_path / "local")
    assert found["rejected.jsonl"] == expected["rejected.jsonl"]
    manifests = [json.loads(files[MANIFEST]) for files in (found, expected)]
    assert manifests[0]["documents"] == manifests[1]["documents"]
    assert manifests[0]["documents"]["written"] == 81
    assert (
        manifests[0]["skipped_files"]
        == manifests[1]["skipped_files"]
        == {
            "directory of caches or dependencies": 1,
            "hidden directory": 2,
            "hidden file": 1,
            "manifest": 1,
            "unsupported file type": 3,
        }
    )


def zipped(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in members.items():
            target.writestr(name, content)
    return out.getvalue()


def test_fsspecs_own_variables_reach_the_workers_too(
    store: Store, corpus: Corpus, whole: dict[str, bytes], endpoint: str
) -> None:
    """Settings in FSSPEC_S3_… instead of AWS_… variables."""
    variables = {
        "FSSPEC_S3_ENDPOINT_URL": endpoint,
        "FSSPEC_S3_KEY": "a-key",
        "FSSPEC_S3_SECRET": "a-secret",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    done = shards(*remote(corpus, *INPUTS).command("s3://bucket/shards", "--workers", "2"), **variables)
    assert done.returncode == 0, done.stderr
    same_but_inputs(store.files("bucket", "shards"), whole)


def test_slices_share_a_store(store: Store, corpus: Corpus, whole: dict[str, bytes]) -> None:
    for index, left in ((1, 5), (0, 2)):
        done = store.shards(*corpus.command("s3://bucket/shards", "--slice", f"{index}/3"))
        assert done.returncode == 0, done.stderr
        assert f"{left} of 8 tasks remain for other slices" in done.stderr
        assert MANIFEST not in store.files("bucket", "shards")
    done = store.shards(*corpus.command("s3://bucket/shards", "--slice", "2/3"))
    assert done.returncode == 0, done.stderr
    assert store.files("bucket", "shards") == whole


@pytest.mark.slow
def test_shards_in_a_store_are_verified_and_a_flipped_byte_is_named(store: Store, corpus: Corpus) -> None:
    assert store.shards(*corpus.command("s3://bucket/shards")).returncode == 0
    done = store.shards("verify", "s3://bucket/shards", "--deep")
    assert done.returncode == 0, done.stderr
    for name in ("train-00003.bin", "train-00003.idx", "train-00003.docs.parquet"):
        whole = store.get("bucket", f"shards/{name}")
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        store.put("bucket", f"shards/{name}", bytes(flipped))
        assert store.shards("verify", "s3://bucket/shards").returncode == 0  # undetectable by size
        assert name in error_of(store.shards("verify", "s3://bucket/shards", "--deep"))
        store.put("bucket", f"shards/{name}", whole[:-1])
        assert name in error_of(store.shards("verify", "s3://bucket/shards"))
        store.put("bucket", f"shards/{name}", whole)
    store.client.delete_object(Bucket="bucket", Key="shards/valid-00000.idx")
    assert "valid-00000.idx is missing" in error_of(store.shards("verify", "s3://bucket/shards"))


def test_an_interrupted_build_resumes_and_keeps_finished_tasks(
    store: Store, corpus: Corpus, whole: dict[str, bytes]
) -> None:
    """The last file is truncated: the tasks before it are done, exactly once."""
    inputs = remote(corpus, *INPUTS)
    strict = inputs.command("s3://bucket/shards", "--workers", "1", on_bad="fail")
    good = corpus.inputs[1].read_bytes()
    plain = [line for line in corpus.inputs[0].read_bytes().splitlines(keepends=True) if b'"content":' in line]
    store.put("bucket", "input/plain.jsonl", b"".join(plain))
    store.put("bucket", "input/packed.jsonl.gz", good[: len(good) // 2])
    message = error_of(store.shards(*strict))
    assert "s3://bucket/input/packed.jsonl.gz" in message and "damaged gzip" in message
    left = store.files("bucket", "shards")
    assert MANIFEST not in left and ".task-00000.json" in left
    store.put("bucket", "input/packed.jsonl.gz", good)
    done = store.shards(*strict)
    assert done.returncode == 0, done.stderr
    found = store.files("bucket", "shards")
    assert not [name for name in found if name.startswith(".")]
    assert found["train-00007.bin"] == whole["train-00007.bin"]
    kept = [name.removesuffix(".json")[-5:] for name in left if name.startswith(".task-")]
    assert len(kept) >= 5
    for number in kept:
        assert store.writes("bucket", f"shards/train-{number}.bin") == 1
    assert store.shards("verify", "s3://bucket/shards", "--deep").returncode == 0


def test_lost_objects_are_made_again_by_an_unfinished_build(
    store: Store, corpus: Corpus, whole: dict[str, bytes]
) -> None:
    assert store.shards(*corpus.command("s3://bucket/shards")).returncode == 0
    for name in (MANIFEST, "train-00002.bin", "tokenizer/tokenizer.json"):
        store.client.delete_object(Bucket="bucket", Key=f"shards/{name}")
    done = store.shards(*corpus.command("s3://bucket/shards"))
    assert done.returncode == 0, done.stderr
    assert store.files("bucket", "shards") == whole
    assert store.shards(*corpus.command("s3://bucket/shards")).returncode == 0
    assert store.writes("bucket", f"shards/{MANIFEST}") == 2  # finished shards are not rewritten


def test_another_corpus_does_not_overwrite_finished_shards(store: Store, corpus: Corpus) -> None:
    assert store.shards(*corpus.command("s3://bucket/shards")).returncode == 0
    fewer = replace(corpus, inputs=corpus.inputs[:1])
    assert "built with different options" in error_of(store.shards(*fewer.command("s3://bucket/shards")))


def test_a_missing_bucket_is_named_and_not_created(store: Store, corpus: Corpus, tmp_path: Path) -> None:
    message = error_of(store.shards(*corpus.command("s3://buckte/shards")))
    assert "s3://buckte/shards" in message
    message = error_of(store.shards(*remote(corpus, "s3://buckte/input").command(tmp_path / "shards")))
    assert "s3://buckte/input" in message
    assert "s3://buckte/shards" in error_of(store.shards("verify", "s3://buckte/shards"))
    assert store.buckets() == {"bucket"}


def every_use(store: Store, corpus: Corpus, output: Path, **more: str) -> list[str]:
    """Errors of building from the store, building into it, and verifying its contents."""
    return [
        error_of(store.shards(*remote(corpus, *INPUTS[:1]).command(output), **more)),
        error_of(store.shards(*remote(corpus, "s3://bucket/input").command(output), **more)),
        error_of(store.shards(*corpus.command("s3://bucket/shards"), **more)),
        error_of(store.shards("verify", "s3://bucket/shards", **more)),
    ]


def test_wrong_credentials_are_named(
    store: Store, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moto.core.authorization.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0)
    try:
        for message in every_use(store, corpus, tmp_path / "shards"):
            assert "s3://bucket/" in message and "credentials" in message
    finally:
        monkeypatch.undo()


@pytest.mark.slow
@pytest.mark.parametrize("apart", [4, pytest.param(1, marks=pytest.mark.nightly)])  # requests between two attempts
def test_credentials_that_expire_while_reading_end_the_build_and_lose_no_document(
    store: Store, corpus: Corpus, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: int
) -> None:
    """A rejected request is not a damaged file: even `--on-bad-document skip` must not skip it."""
    for allowed in range(1, 100, apart):  # requests
        monkeypatch.setattr("moto.core.authorization.settings.INITIAL_NO_AUTH_ACTION_COUNT", allowed)
        monkeypatch.setattr("moto.core.authorization.ActionAuthenticatorMixin.request_count", 0)
        try:
            done = store.shards(*remote(corpus, *INPUTS).command(tmp_path / f"shards-{allowed}", "--workers", "1"))
        finally:
            monkeypatch.undo()
        if done.returncode == 0:
            break
        message = error_of(done)
        assert "s3://bucket/input/" in message and "damaged" not in message, f"{allowed} requests: {message}"
    same_but_inputs(files_of(tmp_path / f"shards-{allowed}"), whole)
    assert allowed > 3


def test_missing_credentials_are_named(store: Store, corpus: Corpus, tmp_path: Path) -> None:
    without = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    message = error_of(store.shards(*corpus.command("s3://bucket/shards"), **without))
    assert "s3://bucket/shards" in message and "credentials" in message


@pytest.mark.nightly
def test_an_unreachable_endpoint_is_named_without_minutes_of_retries(
    store: Store, corpus: Corpus, tmp_path: Path
) -> None:
    for message in every_use(store, corpus, tmp_path / "shards", AWS_ENDPOINT_URL="http://127.0.0.1:1"):
        assert "s3://bucket/" in message and "network" in message


@pytest.mark.parametrize("where", ["input", "output", "verify"])
def test_without_its_package_a_store_is_refused_with_the_command_that_installs_it(
    corpus: Corpus, tmp_path: Path, where: str
) -> None:
    arguments = {
        "input": remote(corpus, *INPUTS).command(tmp_path / "shards"),
        "output": corpus.command("s3://bucket/shards"),
        "verify": ["verify", "s3://bucket/shards"],
    }
    hide = "import sys; sys.modules['s3fs'] = None; from codeparrot_ds.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", hide, "shards", *map(str, arguments[where])],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "pip install s3fs" in error_of(done)


# The Hub


@pytest.fixture(params=["jsonl", "parquet"])
def dataset(request: pytest.FixtureRequest, corpus: Corpus, tmp_path: Path) -> Path:
    """A dataset directory of five files, about 40 documents each."""
    directory = tmp_path / "dataset"
    directory.mkdir()
    lines = [line for line in corpus.inputs[0].read_text().splitlines() if '"content":' in line]
    for part in range(5):
        name, rows = directory / f"train-{part:05d}-of-00005", lines[part * 40 : part * 40 + 40]
        if request.param == "jsonl":
            name.with_suffix(".jsonl").write_text("\n".join(rows) + "\n")
        else:
            pq.write_table(pa.Table.from_pylist([json.loads(row) for row in rows]), name.with_suffix(".parquet"))
    return directory


def documents(*arguments: str | Path) -> list[list[tuple[str, str]]]:
    """Text and path of each document, by piece."""
    found = []
    for piece in find_inputs([str(argument) for argument in arguments]):
        read = list(read_documents(piece))
        assert all(isinstance(document, Document) for document in read)
        found.append([(document.text, document.path) for document in read if isinstance(document, Document)])
    return found


def test_a_streamed_dataset_has_the_documents_of_its_files_a_piece_each(dataset: Path) -> None:
    assert documents(f"hub:{dataset}") == documents(dataset)
    assert len(documents(f"hub:{dataset}?split=train")) == 5


@pytest.mark.slow
def test_a_streamed_dataset_gives_the_same_bytes_with_any_number_of_workers(
    dataset: Path, corpus: Corpus, tmp_path: Path
) -> None:
    streamed = remote(corpus, f"hub:{dataset}")
    for workers in ("1", "2"):
        done = shards(*streamed.command(tmp_path / workers, "--workers", workers))
        assert done.returncode == 0, done.stderr
    found = files_of(tmp_path / "1")
    assert found == files_of(tmp_path / "2")
    assert {f"train-{part:05d}.bin" for part in range(5)} <= found.keys()
    assert "train-00005.bin" not in found
    verify(tmp_path / "1", deep=True)
    compared = shards("verify", tmp_path / "1", "--against-corpus")
    assert compared.returncode == 0, compared.stderr
    for file in sorted(dataset.iterdir()):  # the same ids as from the file itself, one task
        alone = replace(corpus, inputs=[file], shard_tokens=10**6)
        output = tmp_path / file.name
        assert shards(*alone.command(output, "--workers", "1")).returncode == 0
        number = file.name[6:11]
        for split in ("train", "valid"):
            name = f"{split}-{number}.bin"
            assert (name in found) == (output / f"{split}-00000.bin").exists()
            if name in found:
                assert found[name] == (output / f"{split}-00000.bin").read_bytes()


@pytest.mark.slow
def test_a_streamed_dataset_that_was_changed_is_not_resumed_as_the_old_one(
    dataset: Path, corpus: Corpus, tmp_path: Path
) -> None:
    streamed = remote(corpus, f"hub:{dataset}")
    output = tmp_path / "shards"
    assert shards(*streamed.command(output, "--slice", "0/2")).returncode == 0  # unfinished
    files = sorted(dataset.iterdir())
    shutil.copy(files[1], files[0])
    done = shards(*streamed.command(output))
    assert done.returncode == 0, done.stderr
    compared = shards("verify", output, "--against-corpus")
    assert compared.returncode == 0, compared.stderr


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("hub:{tmp}/nothing", "{tmp}/nothing"),
        ("hub:nobody/no-such-dataset", "nobody/no-such-dataset"),
        ("hub:{dataset}?split=test", "test"),
        ("hub:{dataset}?colour=red", "unknown option 'colour'"),
    ],
)
def test_a_dataset_that_cannot_be_opened_is_named(
    dataset: Path, corpus: Corpus, tmp_path: Path, argument: str, expected: str
) -> None:
    places = {"tmp": tmp_path, "dataset": dataset}
    command = remote(corpus, argument.format(**places)).command(tmp_path / "shards")
    assert expected.format(**places) in error_of(shards(*command, timeout=60))
    assert not (tmp_path / "shards").exists()


def test_a_bad_example_of_a_streamed_dataset_is_named(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "a.jsonl").write_text('{"content": "a"}\n{"content": null}\n')
    command = remote(corpus, f"hub:{tmp_path}/dataset").command(tmp_path / "shards", on_bad="fail")
    message = error_of(shards(*command))
    assert f"hub:{tmp_path}/dataset part 0 example 2: not a document" in message

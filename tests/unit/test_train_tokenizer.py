"""`tokenizer train`: its inputs, the sample, the trainers, workers and interruptions. See also test_tokenizer.py."""

import gzip
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import xxhash
from tokenizers import Tokenizer

from codeparrot_ds.documents.inputs import find_inputs
from codeparrot_ds.errors import ConfigError, DataError
from codeparrot_ds.tokenizer import count, trainers
from codeparrot_ds.tokenizer import train as training
from codeparrot_ds.tokenizer.cases import code_points
from codeparrot_ds.tokenizer.encode import Encoder
from codeparrot_ds.tokenizer.train import TrainOptions, train
from codeparrot_ds.tokenizer.trainers import RESERVED_TOKENS, count_words, new_counter, train_on_counts, why_not_fast
from tests.tokenizer_kinds import sources
from tests.unit.test_tokenizer import trained_on

VOCAB_SIZE = 700
TEXTS = [*sources("json", "http", "urllib"), "", "x = 'é🦜中'  # <|endoftext|> <fim_prefix>\n" * 50]


pytest.importorskip("ffbpe")


@pytest.fixture(autouse=True)
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the fast trainer, which has tests of its own, has passed: it takes longer than these texts."""
    monkeypatch.setattr(trainers, "run_apart", lambda function, task: None)
    monkeypatch.setattr(training, "run_apart", lambda function, task: function(task))  # which need not be started


def write(path: Path, texts: Sequence[str], name: str = "content") -> Path:
    """JSON Lines, packed if the name says so."""
    content = "".join(json.dumps({name: text, "path": f"{path.name}/{i}"}) + "\n" for i, text in enumerate(texts))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


def make(inputs: Path | Sequence[Path], output: Path, **options: Any) -> dict[str, Any]:
    return train(inputs, output, VOCAB_SIZE, 32, TrainOptions(**{"workers": 1, **options}))


def many_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_MIN_TASK_BYTES", 20_000)


@pytest.fixture(scope="module")
def reference() -> Tokenizer:
    """What the library itself makes of all texts."""
    return trained_on(TEXTS, VOCAB_SIZE)


def test_the_result_is_that_of_tokenizers(tmp_path: Path, reference: Tokenizer) -> None:
    source = write(tmp_path / "a.jsonl", TEXTS)
    fast = make(source, tmp_path / "fast")
    slow = make(source, tmp_path / "slow", trainer="tokenizers")
    assert fast["trainer"].startswith("ffbpe ") and slow["trainer"].startswith("tokenizers ")
    assert (tmp_path / "fast" / "tokenizer.json").read_bytes() == (tmp_path / "slow" / "tokenizer.json").read_bytes()
    found = Tokenizer.from_file(str(tmp_path / "fast" / "tokenizer.json"))
    assert found.get_vocab() == reference.get_vocab()
    merges = [json.loads(each.to_str())["model"]["merges"] for each in (found, reference)]
    assert merges[0] == merges[1] and len(merges[0]) == VOCAB_SIZE - 256 - 5
    assert all(found.encode(text).ids == reference.encode(text).ids for text in TEXTS)
    assert fast["documents"] == slow["documents"]
    assert fast["documents"] == {
        "read": len(TEXTS),
        "trained on": len(TEXTS) - TEXTS.count(""),
        "empty": TEXTS.count(""),
        "quarantined": 0,
        "not in the sample": 0,
    }
    assert fast["trained_on"]["bytes"] == sum(len(text.encode()) for text in TEXTS)


def test_special_tokens_have_the_first_ids_within_the_size(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", TEXTS)
    manifest = make(source, tmp_path / "tokenizer", reserve=2)
    encoder = Encoder(tmp_path / "tokenizer")
    assert (manifest["vocab_size"], encoder.vocab_size, encoder.eos_id) == (VOCAB_SIZE, VOCAB_SIZE, 0)
    expected = [
        "<|endoftext|>",
        "<fim_prefix>",
        "<fim_middle>",
        "<fim_suffix>",
        "<fim_pad>",
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
    ]
    assert encoder.tokens()[:7] == expected and encoder.tokens()[7] == "!"
    text = "".join(expected)
    assert min(encoder.encode(text)) >= 7 and encoder.decode(encoder.encode(text)) == text
    with pytest.raises(ConfigError, match="bytes and reserved tokens alone are 1,261"):
        train(source, tmp_path / "small", 1260, options=TrainOptions(reserve=1000))


def test_it_takes_what_shards_build_takes(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    digest = make(write(tmp_path / "a.jsonl", TEXTS), tmp_path / "whole")["digest"]
    write(tmp_path / "parts" / "one.jsonl.gz", TEXTS[:9])
    write(tmp_path / "parts" / "deep" / "two.jsonl", TEXTS[9:])
    assert make(tmp_path / "parts", tmp_path / "directory")["digest"] == digest
    pq.write_table(pa.table({"code": TEXTS}), tmp_path / "a.parquet")
    assert make(tmp_path / "a.parquet", tmp_path / "parquet", text_field="code")["digest"] == digest
    for number, text in enumerate(TEXTS):
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / f"{number}.py").write_text(text)
    (tmp_path / "files" / "notes.txt").write_text("no")
    manifest = make(tmp_path / "files", tmp_path / "suffix", suffix=".py")
    assert manifest["digest"] == digest and manifest["skipped_files"] == {"other suffix": 1}
    assert b"notes.txt" in (tmp_path / "suffix" / "rejected.jsonl").read_bytes()
    two = [f"{tmp_path}/parts/*.gz", f"file://{tmp_path}/parts/deep"]
    assert train(two, tmp_path / "glob", VOCAB_SIZE, 32, TrainOptions(workers=1))["digest"] == digest


def test_a_sample_is_of_the_smallest_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text for text in TEXTS if text]
    by_digest = sorted(texts, key=lambda text: xxhash.xxh3_128_intdigest(text.encode()))
    copied = by_digest[5]
    many = [*texts, *[copied] * 4, "", *[by_digest[1]]]
    ordered = sorted((text for text in many if text), key=lambda text: xxhash.xxh3_128_intdigest(text.encode()))
    for documents in (8, 10, len(many) + 1):
        expected = json.loads(trained_on(ordered[:documents], VOCAB_SIZE).to_str())["model"]
        found = []
        for name, order in (("a", many), ("b", many[::-1])):
            monkeypatch.setattr(training, "_MIN_TASK_BYTES", 20_000 if name == "b" else 16_000_000)
            write(tmp_path / f"{name}{documents}" / "1.jsonl", order[:11])
            write(tmp_path / f"{name}{documents}" / "2.jsonl", order[11:])
            output = tmp_path / f"tokenizer-{name}{documents}"
            manifest = make(tmp_path / f"{name}{documents}", output, documents=documents)
            taken = min(documents, len(ordered))
            assert manifest["trained_on"] == {
                "documents": taken,
                "bytes": sum(len(text.encode()) for text in ordered[:documents]),
            }
            assert manifest["documents"]["not in the sample"] == len(ordered) - taken
            found.append(json.loads((output / "tokenizer.json").read_text())["model"])
        assert found[0]["merges"] == found[1]["merges"] == expected["merges"]
        assert found[0]["vocab"] == found[1]["vocab"] == expected["vocab"]


def test_of_the_digests_a_task_keeps_only_the_smallest(tmp_path: Path) -> None:
    import numpy as np

    texts = [f"document {number}" for number in range(5000)]
    source = write(tmp_path / "a.jsonl", texts)
    task = count.Task(find_inputs([str(source)]), "content", False, tmp_path / "out", most=10)
    count.write_digests(task)
    digests = sorted(xxhash.xxh3_128_intdigest(text.encode()) >> 64 for text in texts)
    assert np.load(task.digests)[0].tolist() == digests[:10]


@pytest.mark.parametrize("workers", [2, 4])
def test_the_number_of_workers_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, reference: Tokenizer
) -> None:
    many_tasks(monkeypatch)
    source = write(tmp_path / "a.jsonl", TEXTS)
    make(source, tmp_path / "tokenizer", workers=workers, documents=len(TEXTS))
    found = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    assert json.loads(found.to_str())["model"] == json.loads(reference.to_str())["model"]
    assert not list(tmp_path.glob(".*"))  # nothing else is left


def test_an_interrupted_training_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many_tasks(monkeypatch)
    source = write(tmp_path / "a.jsonl", TEXTS)
    whole = make(source, tmp_path / "whole")
    done: list[str] = []

    def count_words(task: count.Task, most: int) -> None:
        if len(done) == most:
            task.words.write_bytes(b"half")  # as a killed worker leaves it
            raise KeyboardInterrupt
        done.append(task.output.name)
        count.write_words(task)

    for most in (3, 5, 1000):
        monkeypatch.setattr(training, "write_words", lambda task, most=most: count_words(task, most))
        if most < 1000:
            with pytest.raises(KeyboardInterrupt):
                make(source, tmp_path / "tokenizer")
            assert len(done) == most and not (tmp_path / "tokenizer").exists()
    assert make(source, tmp_path / "tokenizer") == whole
    assert len(done) == len(set(done)) > 8  # no task twice
    assert make(source, tmp_path / "tokenizer") == whole  # is finished
    assert len(done) == len(set(done))


def test_a_finished_tokenizer_of_other_input_or_options_is_not_taken(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", TEXTS)
    make(source, tmp_path / "tokenizer")
    with pytest.raises(DataError, match=r"different options \(options = .*'documents': None.*'documents': 5"):
        make(source, tmp_path / "tokenizer", documents=5)
    write(source, TEXTS[1:])
    with pytest.raises(DataError, match=r"finished tokenizer of other input files \(1 changed: a\.jsonl\)"):
        make(source, tmp_path / "tokenizer")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="mine: already exists"):
        make(source, tmp_path / "mine")
    assert not list(tmp_path.glob(".mine*"))  # refused before anything is read


def test_an_unreadable_document_ends_the_training_or_is_listed(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", TEXTS)
    with open(source, "a") as out:
        out.write("no JSON\n" + json.dumps({"text": "x"}) + "\n")
    for how in ({}, {"documents": 3}, {"trainer": "tokenizers"}):
        with pytest.raises(DataError, match=r"a\.jsonl(:| at byte )[\d,]+: not a document: not valid JSON"):
            make(source, tmp_path / "tokenizer", **how)
    for name, how in (("fast", {}), ("sampled", {"documents": 1000}), ("slow", {"trainer": "tokenizers"})):
        manifest = make(source, tmp_path / name, on_bad_document="skip", **how)
        assert manifest["documents"]["quarantined"] == 2
        assert manifest["documents"]["read"] == len(TEXTS) + 2
        lines = (tmp_path / name / "quarantine.jsonl").read_text().splitlines()
        assert len(lines) == 2 and "no field 'content'" in lines[1]


# Which trainer


def expect_slow(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    """Training goes on with `tokenizers`, and one line says why; by name, the fast trainer is refused."""
    monkeypatch.setattr(trainers, "run_apart", lambda function, task: function(task))  # in this process
    source = write(tmp_path / "a.jsonl", TEXTS)
    capsys.readouterr()
    manifest = make(source, tmp_path / "tokenizer")
    assert manifest["trainer"].startswith("tokenizers ")
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"note: training with tokenizers, because {reason}\. It takes about .*", line), line
    with pytest.raises(ConfigError, match=rf"ffbpe cannot be used: {reason}\. Use --trainer auto\."):
        make(source, tmp_path / "other", trainer="ffbpe")


Change = Callable[[pytest.MonkeyPatch], None]


def _ties(monkeypatch: pytest.MonkeyPatch) -> None:
    import ffbpe

    original = ffbpe.BpeTrainer
    monkeypatch.setattr(ffbpe, "BpeTrainer", lambda *a, **k: original(*a, **{**k, "tie_break": "largest_content"}))


def _panic(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    def fail(*arguments: Any) -> None:
        raise PanicException("index out of bounds")

    monkeypatch.setattr(trainers, "train_on_counts", fail)


def _ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        trainers, "train_on_counts", lambda counter, size, reserved: train_on_counts(counter, size, reserved[::-1])
    )


def _words(monkeypatch: pytest.MonkeyPatch) -> None:
    import ffbpe

    original, pattern = ffbpe.PreTokenizer, r"\w+|\W+"
    monkeypatch.setattr(ffbpe, "PreTokenizer", lambda special: original(special, pat_str=pattern))


def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts of 32 bits."""
    original = new_counter()

    class Counter:
        def __init__(self) -> None:
            self.own = trainers.new_counter_of_the_library()

        def words(self) -> dict[str, int]:
            return {word: n % (1 << 32) for word, n in self.own.words().items()}

        def __getattr__(self, name: str) -> Any:
            return getattr(self.own, name)

    assert type(original).__name__ == "WordCounter"
    monkeypatch.setattr(trainers, "new_counter_of_the_library", new_counter, raising=False)
    monkeypatch.setattr(trainers, "new_counter", Counter)
    monkeypatch.setattr(
        trainers, "train_on_counts", lambda counter, *rest: train_on_counts(getattr(counter, "own", counter), *rest)
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_ties, r"ffbpe [\d.]+ merges other pairs in a sample of the input, from merge [\d,]+ on"),
        (_panic, r"ffbpe [\d.]+ failed on a sample of the input \(PanicException: index out of bounds\)"),
        (_ids, r"ffbpe [\d.]+ gives tokens other ids in a sample of the input"),
        (_words, r"ffbpe [\d.]+ splits texts into other words"),
        (_narrow, r"counts of ffbpe [\d.]+ overflow"),
    ],
)
def test_a_fast_trainer_that_differs_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: Change, reason: str
) -> None:
    change(monkeypatch)
    expect_slow(tmp_path, capsys, monkeypatch, reason)


def test_without_the_fast_trainer_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ffbpe", None)
    expect_slow(tmp_path, capsys, monkeypatch, r"ffbpe is not installed \(pip install ffbpe\)")


def test_a_worker_with_another_version_is_named(tmp_path: Path) -> None:
    task = count.Task([], "content", False, tmp_path / "out", trainer="ffbpe 0.0.1")
    with pytest.raises(ConfigError, match=r"has ffbpe [\d.]+, but .* ffbpe 0\.0\.1\. .*pip install ffbpe==0\.0\.1"):
        count.write_words(task)


def test_counts_of_pairs_go_beyond_2_to_the_32() -> None:
    """In order of true counts: xy, cd, ab. Modulo 2**32, they would be 2, 1 and the largest."""
    counter = new_counter()
    words = {"xy": (1 << 33) + 2, "cd": (1 << 32) + 1, "ab": (1 << 32) - 1}
    for bit in range(34):
        for word, times in words.items():
            if times >> bit & 1:
                one = new_counter()
                one.add_batch([word])
                for _ in range(bit):
                    one = doubled(one)
                counter.merge(one)
    assert counter.words() == words
    merges = json.loads(train_on_counts(counter, 264, RESERVED_TOKENS).to_str())["model"]["merges"]
    assert merges == [["x", "y"], ["c", "d"], ["a", "b"]]


def doubled(counter: Any) -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        counter.save(f"{directory}/words")
        counter.merge(trainers.load_counter(Path(directory) / "words"))
    return counter


def test_the_check_covers_what_the_input_holds(tmp_path: Path) -> None:
    """Merging goes on until no pair is left, where nearly all pairs are ties."""
    source = write(tmp_path / "a.jsonl", TEXTS)
    assert why_not_fast((find_inputs([str(source)]), "content")) is None


def test_words_are_counted_as_tokenizers_splits_them() -> None:
    assert count_words(["it's  x9\n", "é x9"]) == {"it": 1, "'s": 1, " ": 1, " x": 2, "9": 2, "\n": 1, "é": 1}


@pytest.mark.nightly
def test_every_character_is_split_alike() -> None:
    """All code points between blanks, letters, digits and line ends: the words that both trainers count."""
    texts = list(code_points())
    for start in range(0, len(texts), 500):
        counter = new_counter()
        counter.add_batch(texts[start : start + 500])
        assert counter.words() == count_words(texts[start : start + 500])

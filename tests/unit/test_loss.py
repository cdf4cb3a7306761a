"""Loss and bits per byte: equal to a computation by hand, in parts and as a whole; two models compared."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from codeparrot_ds.errors import ConfigError, DataError
from codeparrot_ds.evaluation.compare import compare_losses, difference
from codeparrot_ds.evaluation.document_loss import DocumentLoss, Measured, measure
from codeparrot_ds.evaluation.loss import ValidationLoss, dump_measured, merge_measured, ratio, validation_loss
from codeparrot_ds.evaluation.pretrained import load_pretrained
from codeparrot_ds.shards.format import Manifest, read_index, read_provenance
from codeparrot_ds.system.jobs import Slice
from codeparrot_ds.tokenizer.encode import Encoder
from tests.conftest import once
from tests.tiny_models import plain_gpt2
from tests.tokenizer_kinds import KINDS, only_bytes, save

SEQ_LEN, COUNT = 64, 60


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "plain_gpt2", lambda made: plain_gpt2(made, data / "tokenizer"))


@pytest.fixture(scope="module")
def uniform(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that gives every token the same probability."""

    def make(made: Path) -> None:
        plain_gpt2(made, data / "tokenizer")
        found = load_pretrained(made).model
        found.transformer.wte.weight.data.zero_()
        found.save_pretrained(made)

    return once(tmp_path_factory, "uniform_gpt2", make)


def targets_by_hand(shards: Path, sequences: int) -> list[tuple[np.ndarray, str, str, int, int]]:
    """(ids, repository, licence, length and index of the document) of each run of targets, from the files alone."""
    manifest = Manifest.read(shards)
    (shard,) = manifest.split("valid")
    ids = np.fromfile(shards / f"{shard.name}.bin", "<u2").astype(np.int64)
    ends = np.cumsum(read_index(shards / f"{shard.name}.idx").lengths)
    provenance = read_provenance((shards / f"{shard.name}.docs.parquet").read_bytes(), "")
    available = (len(ids) - 1) // SEQ_LEN
    found = []
    for number in (np.arange(sequences) * available // sequences).tolist():
        for place in range(number * SEQ_LEN + 1, (number + 1) * SEQ_LEN + 1):
            at = int(np.searchsorted(ends, place, side="right"))
            length = int(ends[at] - (ends[at - 1] if at else 0))
            found.append((ids[place : place + 1], provenance[at].repository, provenance[at].licence, length, at))
    return found


def test_a_model_of_plain_transformers_is_measured_by_hand(model: Path, data: Path) -> None:
    found = validation_loss(model, data / "shards", COUNT)
    by_hand = targets_by_hand(data / "shards", COUNT)
    ids = np.concatenate([each for each, *_ in by_hand])
    assert found.tokens == len(ids) == COUNT * SEQ_LEN
    encoder = Encoder(data / "tokenizer")
    tokens = [encoder._tokenizer.id_to_token(int(i)) for i in ids]
    sizes = np.array([0 if token == "<|endoftext|>" else len(token) for token in tokens])  # byte level: a letter a byte
    assert found.bytes == sizes.sum()
    assert found.documents == len({at for *_, at in by_hand})

    network = load_pretrained(model).model
    losses = []
    manifest = Manifest.read(data / "shards")
    (shard,) = manifest.split("valid")
    stream = np.fromfile(data / "shards" / f"{shard.name}.bin", "<u2").astype(np.int64)
    available = (len(stream) - 1) // SEQ_LEN
    for number in range(COUNT):
        start = number * available // COUNT * SEQ_LEN
        window = torch.from_numpy(stream[start : start + SEQ_LEN + 1])[None]
        with torch.no_grad():
            logits = network(window[:, :-1]).logits[0].double().log_softmax(-1)
        losses.append(-logits.gather(1, window[0, 1:, None])[:, 0].numpy())
    nats = np.concatenate(losses)
    assert found.loss_valid == pytest.approx(nats.mean(), abs=1e-5)
    assert found.bits_per_byte == pytest.approx(nats.sum() / math.log(2) / sizes.sum(), rel=1e-6)

    # The standard error from the sums of each document.
    documents = np.array([at for *_, at in by_hand])
    bits, per = nats / math.log(2), nats.sum() / math.log(2) / sizes.sum()
    residuals = [bits[documents == at].sum() - per * sizes[documents == at].sum() for at in np.unique(documents)]
    assert len(residuals) > 5
    assert found.bits_per_byte_error == pytest.approx(np.std(residuals, ddof=1) * len(residuals) ** 0.5 / sizes.sum())

    groups = {"by_repository": 1, "by_licence": 2}
    for name, column in groups.items():
        rows = getattr(found, name)
        assert sum(group.bytes for group in rows) == found.bytes
        for group in rows:
            inside = np.array([(each[column] or "unknown") == group.name for each in by_hand])
            assert group.tokens == inside.sum()
            assert group.bytes == sizes[inside].sum()
            assert group.loss == pytest.approx(nats[inside].mean(), abs=1e-5)
    assert len(found.by_length) > 1
    bounds = {"below 256": (0, 256), "256 to": (256, 1024), "1,024 to": (1024, 4096), "4,096 to": (4096, 16384)}
    for group in found.by_length:
        low, high = next((bounds[key] for key in bounds if group.name.startswith(key)), (16384, 1 << 60))
        assert group.tokens == sum(low <= each[3] < high for each in by_hand)


def test_a_uniform_model_needs_the_logarithm_of_the_vocabulary(uniform: Path, data: Path) -> None:
    found = validation_loss(uniform, data / "shards", 5)
    assert found.loss_valid == pytest.approx(math.log(512), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(found.tokens * 9 / found.bytes, rel=1e-6)  # 2^9 tokens
    assert found.loss_error == pytest.approx(0, abs=1e-6)


def test_slices_add_up_to_the_whole(model: Path, data: Path) -> None:
    found, sources = load_pretrained(model), {data / "shards": 1.0}
    whole = measure(found, sources, 5)
    parts = [measure(found, sources, 5, part=Slice(i, 8)) for i in range(8)]  # the last three are empty
    merged = merge_measured([f"Welcome to {{host}}\n{dump_measured(part)}\n" for part in parts])
    assert [each.key for each in merged.documents] == [each.key for each in whole.documents]
    assert merged.sequences == 5
    expected, result = ValidationLoss.of(whole).to_dict(), ValidationLoss.of(merged).to_dict()
    assert json.dumps(result, default=str)[:20] == json.dumps(expected, default=str)[:20]
    assert {k: v for k, v in result.items() if not k.startswith("by")} == pytest.approx(
        {k: v for k, v in expected.items() if not k.startswith("by")}, rel=1e-9
    )
    assert ValidationLoss.of(parts[7]).loss_valid == 0
    other = replace(parts[0], loss_unigram=parts[0].loss_unigram * 1.001)
    with pytest.raises(DataError, match="different sequences"):
        merge_measured([dump_measured(other), dump_measured(parts[1])])
    for output in ("", "command not found", '{"documents": 1}', '{"documents"'):
        with pytest.raises(DataError, match="returned no loss"):
            merge_measured([output])


def test_a_shorter_sequence_and_one_beyond_the_context(model: Path, data: Path) -> None:
    assert validation_loss(model, data / "shards", 4, seq_len=16).tokens == 64
    with pytest.raises(ConfigError, match="--seq-len 65: exceeds the model's context of 64 tokens"):
        validation_loss(model, data / "shards", 4, seq_len=65)


def document(number: int, size: int, nats: float) -> DocumentLoss:
    return DocumentLoss(0, "valid-00000", number, None, None, 100, 10, size, nats)


def test_the_paired_difference_is_surer_than_its_parts() -> None:
    generator = np.random.default_rng(0)
    sizes = generator.integers(20, 60, 400)
    hard = generator.normal(1.0, 0.3, 400)  # nats per byte of each document, for both models
    a = Measured([document(i, int(sizes[i]), hard[i] * sizes[i]) for i in range(400)], 1, 1.0)
    better = hard - 0.02 + generator.normal(0, 0.05, 400)
    b = Measured([document(i, int(sizes[i]), better[i] * sizes[i]) for i in range(400)], 1, 1.0)
    found = difference(a, b)
    assert found.difference == pytest.approx(found.b - found.a)
    assert found.low is not None and found.high is not None and found.error is not None
    assert found.low < found.difference < found.high < 0
    assert found.difference == pytest.approx(-0.02 / math.log(2), abs=3 * found.error)
    assert (found.low + found.high) / 2 == pytest.approx(found.difference)
    assert found.verdict() == "B is better"
    alone = ValidationLoss.of(a).bits_per_byte_error
    assert alone is not None and found.error < alone / 4
    assert found.b_better == np.mean(better < hard)
    assert difference(b, a).verdict() == "A is better"
    assert difference(a, a).verdict() == "no difference beyond chance"


def test_the_interval_covers_the_truth_19_times_in_20() -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        sizes = generator.integers(1, 100, 50).astype(float)
        found, error = ratio(sizes * 2 + generator.normal(0, 10, 50), sizes)
        assert found is not None and error is not None
        hits += abs(found - 2) < 1.96 * error
    assert 0.9 < hits / 400 < 0.98


def test_two_models_on_the_same_sequences(model: Path, uniform: Path, data: Path) -> None:
    found = compare_losses(uniform, model, {data / "shards": 1.0}, 4)
    assert found.loss_a == pytest.approx(math.log(512), rel=1e-6)
    assert found.loss_b == pytest.approx(validation_loss(model, data / "shards", 4).loss_valid)
    assert found.verdict() == "A is better"  # random preferences are worse than none


def test_shards_of_another_tokenizer_are_refused(model: Path, data: Path, tmp_path: Path) -> None:
    copy = load_pretrained(model)
    copy.encoder._tokenizer.add_tokens(["foo"])
    with pytest.raises(DataError, match="gives other ids than the model's tokenizer"):
        measure(copy, {data / "shards": 1.0}, 2)


@pytest.mark.parametrize("kind", ["only-bytes", "unigram", "sentencepiece-bpe", "added"])
def test_bytes_of_tokens_are_those_of_their_text(kind: str, tmp_path: Path) -> None:
    encoder = Encoder(save(only_bytes() if kind == "only-bytes" else KINDS[kind](), tmp_path))
    text = "def f(é):\n\t\treturn  '\U0001f99c 你好'  <x>y    def\r\n"
    blank = 1 if kind in ("unigram", "sentencepiece-bpe") else 0  # which the tokenizer puts before a text
    assert encoder.token_bytes()[encoder.encode(text)].sum() == len(text.encode()) + blank
    assert encoder.token_bytes()[encoder.eos_id] == 0

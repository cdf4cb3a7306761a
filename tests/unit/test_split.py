"""A corpus as train and validation: the split of `shards build`, declared in a card that `datasets` understands."""

import json
from pathlib import Path
from typing import Any

import pytest

from codeparrot_ds.corpus.card import CARD, split_card
from codeparrot_ds.corpus.clean import CleanOptions, clean
from codeparrot_ds.corpus.collect import collect
from codeparrot_ds.corpus.split import split_corpus
from codeparrot_ds.documents.document import Document
from codeparrot_ds.documents.inputs import Corpus
from codeparrot_ds.documents.read import read_local
from codeparrot_ds.errors import ConfigError, DataError
from codeparrot_ds.export import hub
from codeparrot_ds.export.hub import push
from codeparrot_ds.shards.build import build
from codeparrot_ds.shards.format import read_provenance
from codeparrot_ds.shards.options import BuildOptions
from tests.unit.test_clean import NO_PROBLEMS, function, write

FRACTION = 0.2
FORMATS = ["jsonl.gz", "jsonl.zst", "parquet"]


def corpus(directory: Path, file_format: str, documents: int = 60) -> Path:
    """A corpus of several files in this format."""
    texts = [function(f"f{number}") for number in range(documents)]
    if file_format == "jsonl.gz":
        (directory / "src").mkdir()
        for number, text in enumerate(texts):
            (directory / "src" / f"{number}.py").write_text(text)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("codeparrot_ds.corpus.collect._DOCUMENT_FILE_BYTES", 8_000)
            collect(directory / "corpus", [directory / "src"])
    else:
        source = write(directory / "in" / "a.jsonl", texts)
        options = CleanOptions(cleaning=NO_PROBLEMS, workers=1, file_format=file_format, file_bytes=8_000)
        clean([source], directory / "corpus", options)
    return directory / "corpus"


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_split_is_that_of_the_shards(file_format: str, tmp_path: Path, data: Path) -> None:
    """Also of shards that are built from the split corpus; `datasets` loads both splits from its directory."""
    directory = corpus(tmp_path, file_format)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    whole = Corpus.open(directory)
    assert len(whole.files) > 3
    output = tmp_path / "split"
    output.mkdir()
    manifest = split_corpus(whole, output, FRACTION)
    (output / CARD).write_text(split_card((directory / CARD).read_text(), manifest))
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    documents = {
        split: [document for path in sorted(output.glob(f"{split}-*")) for document in read_local(path)]
        for split in ("train", "validation")
    }
    assert sorted([*documents["train"], *documents["validation"]]) == sorted(whole)
    assert manifest["splits"] == {split: len(each) for split, each in documents.items()}
    for source, name in ((directory, "whole"), (output, "halves")):
        options = BuildOptions(valid_fraction=FRACTION, workers=1)
        assert build(source, data / "tokenizer", tmp_path / name, options) is not None
        for split, shards in (("train", "train"), ("validation", "valid")):
            built = [
                document.path
                for path in sorted((tmp_path / name).glob(f"{shards}-*.docs.parquet"))
                for document in read_provenance(path.read_bytes(), str(path))
            ]
            assert built == [document.path for document in documents[split]]
    from datasets import load_dataset

    loaded = load_dataset(str(output), cache_dir=str(tmp_path / "cache"))
    assert set(loaded) == {"train", "validation"}
    assert all([*loaded[split]["content"]] == [d.text for d in each] for split, each in documents.items())


def test_a_file_without_documents_of_a_split_leaves_no_gap(tmp_path: Path) -> None:
    directory = corpus(tmp_path, "jsonl.zst", 200)
    output = tmp_path / "split"
    output.mkdir()
    manifest = split_corpus(Corpus.open(directory), output, 0.02)
    names = [entry["name"] for entry in manifest["files"]]
    assert sorted(path.name for path in output.iterdir()) == sorted([*names, "manifest.json"])
    validation = [name for name in names if name.startswith("validation")]
    assert 0 < len(validation) < len(Corpus.open(directory).files)
    assert validation == [f"validation-{number:05d}.jsonl.zst" for number in range(len(validation))]
    assert len(list(Corpus.open(output))) == 200


MANIFEST: dict[str, Any] = {
    "valid_fraction": 0.02,
    "splits": {"train": 98, "validation": 2},
    "files": [{"name": "train-00000.parquet"}],
}
DECLARED = "train-*.parquet", "validation-*.parquet"


@pytest.mark.parametrize(
    "card",
    [
        "",
        "# Mine\n",
        "---\nlicense: mit\n---\n# Mine\n\n## Splits\nas usual\n\n## Further\nthings\n",
        "---\nlicense: mit\nconfigs:\n- config_name: mine\n  data_files: documents-*.jsonl.gz\n---\n# Mine\n",
    ],
)
def test_a_card_names_the_files_of_the_splits(card: str) -> None:
    found = split_card(card, MANIFEST)
    assert all(pattern in found for pattern in DECLARED) and "documents-*" not in found.partition("\n---\n")[0]
    assert ("license: mit" in found, "# Mine" in found) == ("license" in card, "Mine" in card)
    assert ("## Further\nthings" in found) == ("Further" in card)
    assert found.count("## Splits") == 1 and "--valid-fraction 0.02" in found
    assert split_card(found, MANIFEST) == found
    assert "0.3" in split_card(found, {**MANIFEST, "valid_fraction": 0.3})
    alone = split_card(card, {**MANIFEST, "splits": {"train": 100, "validation": 0}})
    assert DECLARED[0] in alone and DECLARED[1] not in alone


def test_a_corpus_that_is_split_is_pushed_as_it_is(tmp_path: Path) -> None:
    output = tmp_path / "split"
    output.mkdir()
    split_corpus(Corpus.open(corpus(tmp_path, "jsonl.zst", 30)), output, FRACTION)
    names = [path.name for path in output.iterdir()]
    with hub._split(Corpus.open(output), names, FRACTION) as (files, _):
        assert files == {name: output / name for name in names}
    with hub._split(Corpus.open(output), names, 0.5) as (files, manifest):
        assert manifest["splits"]["validation"] > 10
        assert all((path.parent == output / ".push") == (name != "rejected") for name, path in files.items())
    assert not (output / ".push").exists()


def test_what_is_no_corpus_is_not_split(tmp_path: Path, data: Path) -> None:
    directory = corpus(tmp_path, "jsonl.zst", 10)
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="must be between 0 and 1"):
            push(directory, "me/corpus", valid_fraction=fraction)
    with pytest.raises(ConfigError, match="--valid-fraction is for a corpus"):
        push(data / "tokenizer", "me/tokenizer", valid_fraction=0.1)
    file = next(directory.glob("documents-*"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match="the manifest says"):
        push(directory, "me/corpus")


def test_two_splits_of_a_dataset_are_one_input(tmp_path: Path, data: Path) -> None:
    from codeparrot_ds.documents.inputs import find_inputs
    from codeparrot_ds.documents.read import read_documents

    output = tmp_path / "split"
    output.mkdir()
    manifest = split_corpus(Corpus.open(corpus(tmp_path, "jsonl.zst")), output, FRACTION)
    (output / CARD).write_text(split_card("", manifest))

    def texts(query: str) -> list[str]:
        pieces = find_inputs([f"hub:{output}{query}"])
        return [read.text for piece in pieces for read in read_documents(piece) if isinstance(read, Document)]

    train, valid = texts(""), texts("?split=validation")
    assert (len(train), len(valid)) == tuple(manifest["splits"].values())
    assert texts("?split=train+validation") == [*train, *valid]
    options = BuildOptions(valid_fraction=FRACTION, workers=1)
    with pytest.raises(DataError, match=r"none was taken.* hub:NAME\?split=train\+validation"):
        build(f"hub:{output}", data / "tokenizer", tmp_path / "shards", options)


def test_statistics_say_what_came_in_and_what_each_step_removed(tmp_path: Path) -> None:
    """Counted by hand: groups of exact and near-duplicates, sizes, licences, languages."""
    from codeparrot_ds.corpus.stats import summarize

    near = [function("near", 60).replace("near_59", f"other_{number}") for number in range(4)]
    exact = [function("exact") + "\n" * number for number in range(3)]
    pair = [function("pair") + " " * number for number in range(2)]
    one = [function("one")]
    write(tmp_path / "in" / "a.jsonl", [*near, *exact, "def f(): pass"], license="mit", language="Python")
    write(tmp_path / "in" / "b.jsonl", [*pair, *one, ""], license="gpl-3.0", repo_name="\x1b[2Jr")
    clean([tmp_path / "in"], tmp_path / "out", CleanOptions(cleaning=NO_PROBLEMS, workers=1))
    found = summarize(tmp_path / "out", 1)
    assert (found.read, found.kept) == (12, 4)
    assert found.steps == {
        "measure": {"empty": 1, "few assignments": 1},
        "exact": {"exact duplicate": 3},
        "extremes": {"near-duplicate": 3},
    }
    assert found.removed == {reason: n for each in found.steps.values() for reason, n in sorted(each.items())}
    assert {reason: len(examples) for reason, examples in found.examples.items()} == dict.fromkeys(found.removed, 1)
    exact_groups, near_groups = found.duplicate_groups["exact"], found.duplicate_groups["near"]
    assert (exact_groups["groups"], exact_groups["documents"]) == (2, 5)
    assert exact_groups["by_size"] == {"2": 1, "3-4": 1}
    assert [each["size"] for each in exact_groups["largest"]] == [3, 2]
    assert exact_groups["largest"][0]["document"].startswith("r a/")
    assert (near_groups["groups"], near_groups["documents"], near_groups["by_size"]) == (1, 4, {"3-4": 1})
    sizes = sorted(len(text) for text in [*near, *exact, "def f(): pass", *pair, *one, ""])
    read = found.sizes["read"]
    assert (read["documents"], read["bytes"], read["min"], read["max"]) == (12, sum(sizes), 0, sizes[-1])
    assert (read["median"], read["p90"], read["p99"]) == (sizes[5], sizes[10], sizes[11])
    assert found.sizes["kept"]["bytes"] == found.text_bytes
    assert found.read_by == {
        "licences": {"gpl-3.0": 4, "mit": 8},
        "languages": {"": 4, "Python": 8},
        "suffixes": {".py": 12},
        "secrets": {},
    }
    assert found.kept_by == {
        "licences": {"gpl-3.0": 2, "mit": 2},
        "languages": {"": 2, "Python": 2},
        "suffixes": {".py": 4},
    }
    from typer.testing import CliRunner

    from codeparrot_ds.cli import app

    shown = CliRunner().invoke(app, ["corpus", "stats", str(tmp_path / "out"), "--examples", "9"])
    assert shown.exit_code == 0 and "\x1b" not in shown.stdout  # names are those of strangers
    assert "groups of near duplicates" in shown.stdout and shown.stdout.count("(0.9") == 3
    body = json.loads(CliRunner().invoke(app, ["corpus", "stats", str(tmp_path / "out"), "--json"]).stdout)
    assert body == json.loads(json.dumps(summarize(tmp_path / "out", 2).as_json()))


def test_very_many_licences_are_summed_up() -> None:
    from codeparrot_ds.corpus.tallies import OTHERS, add_up

    counts = [{f"licence {n:04}": 1 for n in range(1500)}, {"MIT": 5, "licence 0003": 1}]
    found = add_up(counts)
    assert len(found) == 1001 and found["MIT"] == 5 and found["licence 0003"] == 2 and found[OTHERS] == 501
    assert sum(found.values()) == 1506

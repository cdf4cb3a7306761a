"""Fields of the input by name or dotted path, in every format and in every command that takes them."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from codeparrot_ds.cli import app
from codeparrot_ds.corpus.clean import CleanOptions, clean
from codeparrot_ds.corpus.options import Cleaning, Heuristics, load_cleaning, override
from codeparrot_ds.documents.document import BadDocument, Document, Read
from codeparrot_ds.documents.fields import Fields
from codeparrot_ds.documents.inputs import Corpus, find_inputs
from codeparrot_ds.documents.read import read_documents
from codeparrot_ds.documents.source import is_python
from codeparrot_ds.errors import ConfigError, DataError
from codeparrot_ds.shards.build import build
from codeparrot_ds.shards.format import read_provenance
from codeparrot_ds.shards.options import BuildOptions
from codeparrot_ds.shards.verify import verify_against_corpus
from tests.unit.test_clean import NO_PROBLEMS, function

NAMED = Fields("doc.text", "meta.repo", "meta.at.path", "meta.lic", "meta.how", "meta.lang", "meta.rev")
OPTIONS = [
    *("--text-field", "doc.text", "--repository", "meta.repo", "--path", "meta.at.path", "--licence-field", "meta.lic"),
    *("--source-field", "meta.how", "--language", "meta.lang", "--commit-field", "meta.rev"),
]


def row(text: Any = "x = 1\n", **meta: Any) -> dict[str, Any]:
    """A row with everything in objects, and a usual name that is not to be used."""
    usual = {
        "repo": "o/r",
        "at": {"path": "a.py"},
        "lic": ["MIT", "ISC"],
        "how": "crawl",
        "lang": "Python",
        "rev": "0f",
    }
    return {"doc": {"text": text}, "repo_name": "not this", "meta": {**usual, **meta}}


def write(directory: Path, kind: str, rows: list[Any]) -> Path:
    directory.mkdir(exist_ok=True)
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), directory / "a.parquet", row_group_size=2)
    elif kind == "array":
        (directory / "a.json").write_text(json.dumps(rows))
    else:
        nan = {"score": float("nan")} if kind == "slow" else {}  # what msgspec rejects takes another path
        (directory / "a.jsonl").write_text("".join(json.dumps({**each, **nan}) + "\n" for each in rows))
    return directory


def read(directory: Path | str, fields: Fields) -> list[Read]:
    return [found for piece in find_inputs([str(directory)]) for found in read_documents(piece, fields)]


KINDS = ["jsonl", "slow", "array", "parquet"]


@pytest.mark.parametrize("kind", [*KINDS, "hub"])
def test_paths_lead_into_objects(kind: str, tmp_path: Path) -> None:
    directory = write(tmp_path / "in", "jsonl" if kind == "hub" else kind, [row(), row("y", repo=None, lic=None)])
    first, second = read(f"hub:{directory}" if kind == "hub" else directory, NAMED)
    assert first == Document("x = 1\n", "o/r", "a.py", "MIT, ISC", "crawl", "Python", "0f")
    assert second == Document("y", "", "a.py", "", "crawl", "Python", "0f")  # null is unknown


@pytest.mark.parametrize("kind", KINDS)
def test_an_object_on_the_way_may_be_null(kind: str, tmp_path: Path) -> None:
    rows = [row(), {**row("y"), "meta": None}, {**row("z"), "doc": None}]
    _, second, third = read(write(tmp_path / "in", kind, rows), NAMED)
    assert isinstance(second, Document) and re.fullmatch(r"a\.\w+#2", second.path) and second.repository == ""
    assert isinstance(third, BadDocument) and "field 'doc.text' has type NoneType, not text" in third.reason


def test_a_field_of_exactly_this_name_comes_first(tmp_path: Path) -> None:
    rows = [{"meta.repo": "exact", "content": "x", "meta": {"repo": "nested"}}]
    for kind in ("jsonl", "slow", "parquet"):
        (found,) = read(write(tmp_path / kind, kind, rows), Fields(repository="meta.repo"))
        assert isinstance(found, Document) and found.repository == "exact"
    (tmp_path / "t.csv").write_text("content,meta.repo\nx,of a table\n")
    (found,) = read(tmp_path / "t.csv", Fields(repository="meta.repo"))
    assert isinstance(found, Document) and found.repository == "of a table"


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no text": (
        {**row(), "doc": {"code": "x"}},
        r"no field 'doc\.text' \('doc' has the fields: 'code'; .*--text",
    ),
    "no object": ({**row(), "doc": "x"}, r"no field 'doc\.text', because 'doc' has type str, not an .*--text-field"),
    "a list": ({**row(), "doc": [{"text": "x"}]}, r"because 'doc' has type list, not an object"),
    "text is a number": (row(5), r"field 'doc\.text' has type int, not text"),
    "no repository": ({**row(), "meta": {"at": {}}}, r"no field 'meta\.repo' \('meta' has .*--repository-field"),
    "path in a text": (row(at="a.py"), r"no field 'meta\.at\.path', because 'meta\.at' has type str.*--path-field"),
    "licence is an object": (row(lic={"spdx": "MIT"}), r"field 'meta\.lic' has type dict, not text"),
    "language is true": (row(lang=True), r"field 'meta\.lang' has type bool, not text"),
    "licences are numbers": (row(lic=[1]), r"field 'meta\.lic' has type list, not text"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_row_without_a_field_that_is_named_is_bad(name: str, tmp_path: Path) -> None:
    bad, reason = BAD[name]
    for kind in ("jsonl", "slow", "array"):
        first, second, third = read(write(tmp_path / kind, kind, [row(), bad, row()]), NAMED)
        assert isinstance(first, Document) and isinstance(third, Document)
        assert isinstance(second, BadDocument) and re.search(reason, second.reason), second
        assert second.where.endswith((":2", "value 2"))


def test_a_table_without_a_column_that_is_named_is_refused_once(tmp_path: Path) -> None:
    write(tmp_path / "p", "parquet", [row()] * 5)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.csv").write_text("content,path\nx,a\ny,b\n")
    for fields, directory, reason, rows in (
        (Fields("doc.code"), "p", r"no column 'doc\.code' \(its columns: .*'doc\.text'.*--text-field", 5),
        (Fields("doc.text", path="meta.repo.x"), "p", r"no column 'meta\.repo\.x' .*--path-field", 5),
        (Fields(language="lang.name"), "c", r"no column 'lang\.name' \(its columns: 'content', 'path'; .*--lang", 2),
    ):
        (bad,) = read(tmp_path / directory, fields)
        assert isinstance(bad, BadDocument) and bad.documents == rows and re.search(reason, bad.reason), bad


def test_only_the_columns_that_are_named_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other fields of an object may be large."""
    write(tmp_path / "in", "parquet", [row(blob="b" * 1000)])
    columns: list[Any] = []
    right = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda *a, **named: columns.append(named["columns"]) or right(*a, **named)
    )
    (found,) = read(tmp_path / "in", Fields("doc.text", repository="meta.repo"))
    assert isinstance(found, Document) and columns == [["doc.text", "meta.repo"]]


def test_the_text_is_no_provenance(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--path-field content: this field holds the text"):
        Fields(path="content")
    directory = write(tmp_path / "in", "jsonl", [{"source": {"code": "x" * 50}, "repo": {"id": 3}}])
    (found,) = read(directory, Fields("source.code"))
    assert found == Document("x" * 50, "", "a.jsonl#1", "", "")


def invoke(*arguments: str | Path) -> str:
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def test_shards_and_a_corpus_are_made_from_the_named_fields(data: Path, tmp_path: Path) -> None:
    texts = [function(f"f{n}") for n in range(40)]
    source = write(tmp_path / "in", "jsonl", [row(text, at={"path": f"{n}.py"}) for n, text in enumerate(texts)])
    how = ["--workers", "1", *OPTIONS]
    shards = tmp_path / "shards"
    tokenizer = ("--tokenizer", data / "tokenizer", "--valid-fraction", "0.2")
    assert json.loads(invoke("shards", "build", source, "-o", shards, *tokenizer, *how, "--json"))
    found = [d for path in sorted(shards.glob("*.docs.parquet")) for d in read_provenance(path.read_bytes(), str(path))]
    assert sorted(d.path for d in found) == sorted(f"{n}.py" for n in range(40))
    assert {(d.repository, d.licence, d.source) for d in found} == {("o/r", "MIT, ISC", "crawl")}
    manifest = build(source, data / "tokenizer", shards, BuildOptions("doc.text", _provenance(), valid_fraction=0.2))
    assert manifest is not None and manifest.options["provenance"]["repository"] == "meta.repo"
    assert verify_against_corpus(manifest) == 40
    with pytest.raises(DataError, match="built with different options"):
        build(source, data / "tokenizer", shards, BuildOptions("doc.text", {"path": "meta.repo"}, valid_fraction=0.2))
    invoke("corpus", "clean", source, "-o", tmp_path / "corpus", "--no-decontaminate", *how)
    cleaned = list(Corpus.open(tmp_path / "corpus"))
    assert sorted(d.text for d in cleaned) == sorted(texts)
    assert {(d.repository, d.language, d.commit) for d in cleaned} == {("o/r", "Python", "0f")}


def _provenance() -> dict[str, str | None]:
    return {**NAMED.named}


def test_the_fields_of_a_corpus_are_in_its_file_of_rules(tmp_path: Path) -> None:
    (tmp_path / "clean.yaml").write_text("fields: {text: doc.text, repository: meta.repo, path: meta.lang}\n")
    cleaning = override(
        load_cleaning(tmp_path / "clean.yaml"),
        licences=None,
        secrets=None,
        decontaminate=False,
        fields={"path": "meta.at.path", "text": None},
    )
    source = write(tmp_path / "in", "jsonl", [row(function("one")), row(function("two"))])
    clean([source], tmp_path / "out", CleanOptions(cleaning=cleaning, workers=1))
    assert {(d.repository, d.path) for d in Corpus.open(tmp_path / "out")} == {("o/r", "a.py")}
    for field in ("path: doc.text, text: doc.text", "text: ''"):
        (tmp_path / "clean.yaml").write_text(f"fields: {{{field}}}\n")
        with pytest.raises(ConfigError, match=r"--path-field doc\.text: this field holds|fields\.text: must have"):
            CleanOptions(cleaning=load_cleaning(tmp_path / "clean.yaml"))
    (tmp_path / "clean.yaml").write_text("fields: {repositry: meta.repo}\n")
    with pytest.raises(ConfigError, match=r"fields\.repositry: unknown key"):
        load_cleaning(tmp_path / "clean.yaml")


def test_bad_rows_of_a_corpus_end_the_command_or_are_counted(tmp_path: Path) -> None:
    source = write(tmp_path / "in", "jsonl", [row(function("one")), {**row(), "meta": 5}, row(function("two"))])
    cleaning = override(
        NO_PROBLEMS, licences=None, secrets=None, decontaminate=False, fields={"text": "doc.text", **_provenance()}
    )
    with pytest.raises(DataError, match=r"a\.jsonl:2: not a document: no field 'meta\.repo', because 'meta' has type"):
        clean([source], tmp_path / "out", CleanOptions(cleaning=cleaning, workers=1))
    options = CleanOptions(cleaning=cleaning, workers=1, on_bad_document="skip")
    manifest = clean([source], tmp_path / "out", options)
    assert manifest is not None and manifest["removed"] == {"unreadable": 1} and manifest["documents"] == 2


PYTHON = ["Python", "PYTHON", "python3", "Python 3", "python-2.7", "py", " Python3.11 ", "CPython"]
OTHER = ["", "Java", "Cython", "IronPython?", "pyret", "Jupyter Notebook", "C", "pythonic", "en", "Python, Java"]


def test_python_is_known_by_its_suffix_or_its_language() -> None:
    assert all(is_python("a.txt", language) for language in PYTHON)
    assert not any(is_python("a.txt", language) for language in OTHER)
    assert all(is_python(f"a{suffix}") for suffix in (".py", ".PY", ".pyi", ".pyw", ".pyx"))
    assert not any(is_python(f"a{suffix}") for suffix in (".pyc", ".java", "py", ""))
    assert is_python("a.py", "en")  # a natural language, in some corpora


@pytest.mark.parametrize(
    ("path", "language", "python"),
    [("a.txt", "PYTHON3", True), ("a.py", "", True), ("a.java", "Java", False), ("a.txt", "", False)],
)
def test_the_rules_of_python_are_for_python(path: str, language: str, python: bool, tmp_path: Path) -> None:
    """A document without assignments, and without keywords, is removed if it is Python."""
    cleaning = override(NO_PROBLEMS, licences=None, secrets=None, decontaminate=False)
    cleaning = cleaning.model_copy(update={"heuristics": Heuristics(removed_share=1.0)})
    odd = [{"content": text, "path": path, "lang": language} for text in ("def f(): pass", "a = b = c = d = e = f")]
    write(tmp_path / "in", "jsonl", [{"content": function("kept"), "path": "kept"}, *odd])
    manifest = clean([tmp_path / "in"], tmp_path / "out", CleanOptions(cleaning=cleaning, workers=1))
    assert manifest is not None
    assert manifest["removed"] == ({"few assignments": 1, "no keywords": 1} if python else {})
    assert manifest["read_by"]["languages"] == ({"": 3} if not language else {"": 1, language: 2})


def test_the_default_rules_name_no_field() -> None:
    assert Fields(**Cleaning().fields.model_dump()) == Fields()

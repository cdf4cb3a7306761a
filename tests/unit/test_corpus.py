"""Collecting documents, and rejecting bad ones by name."""

import gzip
import json
import os
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from codeparrot_ds.cli import app
from codeparrot_ds.corpus.collect import collect, other_suffixes
from codeparrot_ds.documents.inputs import Corpus, search_inputs
from codeparrot_ds.documents.read import read_local
from codeparrot_ds.errors import ConfigError, DataError
from codeparrot_ds.system.files import MANIFEST


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    root = tmp_path / "sources"
    for name, content in {
        "a.py": b"print('a')\n",
        "copy/of_a.py": b"print('a')\n",
        "b.py": b"import os\n" * 30,
        "empty.py": b" \n",
        "latin.py": b"# caf\xe9\n",
        "big.py": b"x = 1\n" * 100_000,
        "notes.txt": b"not python",
        ".git/hook.py": b"print('never')\n",
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (root / "link.py").symlink_to(root / "b.py")
    return root


def test_copies_links_and_unfit_files_are_skipped_and_counted(sources: Path, tmp_path: Path) -> None:
    manifest = collect(tmp_path / "corpus", [sources], max_file_bytes=10_000)
    documents = list(Corpus.open(tmp_path / "corpus"))
    assert sorted((d.repository, d.path) for d in documents) == [("sources", "a.py"), ("sources", "b.py")]
    assert manifest["documents"] == 2
    assert manifest["skipped"] == {
        "directory of caches or dependencies": 1,
        "duplicate": 1,
        "empty": 1,
        "not UTF-8": 1,
        "other suffix": 1,
        "symbolic link": 1,
        "too large": 1,
    }


def test_the_bytes_are_a_function_of_the_sources(sources: Path, tmp_path: Path) -> None:
    first = collect(tmp_path / "one", [sources])
    second = collect(tmp_path / "two", [sources])
    assert first == second
    assert [f.read_bytes() for f in Corpus.open(tmp_path / "one").files] == [
        f.read_bytes() for f in Corpus.open(tmp_path / "two").files
    ]


def test_a_sample_is_a_subset(sources: Path, tmp_path: Path) -> None:
    for number in range(50):
        (sources / f"n{number}.py").write_text(f"n = {number}\n" * 10)
    whole = {d.path for d in _collected(sources, tmp_path / "whole", None)}
    part = {d.path for d in _collected(sources, tmp_path / "part", 2_000)}
    assert part < whole
    assert 5 < len(part) < 30


def _collected(sources: Path, output: Path, sample_bytes: int | None) -> list:
    collect(output, [sources], max_file_bytes=10_000, sample_bytes=sample_bytes)
    return list(Corpus.open(output))


def test_a_finished_corpus_is_kept_and_other_options_are_refused(sources: Path, tmp_path: Path) -> None:
    manifest = collect(tmp_path / "corpus", [sources])
    assert collect(tmp_path / "corpus", [sources]) == manifest
    with pytest.raises(DataError, match="built with different options"):
        collect(tmp_path / "corpus", [sources], max_file_bytes=5)


def test_no_source_files_is_an_error_that_says_where(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"no \.py files found in {tmp_path}"):
        collect(tmp_path / "corpus", [tmp_path])
    assert not (tmp_path / "corpus").exists()


def test_a_file_name_that_is_not_utf8_is_counted(sources: Path, tmp_path: Path) -> None:
    (Path(os.fsdecode(os.fsencode(sources) + b"/caf\xe9.py"))).write_text("print('name')", encoding="utf-8")
    manifest = collect(tmp_path / "corpus", [sources])
    assert manifest["skipped"]["name not UTF-8"] == 1


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent: no such directory"):
        collect(tmp_path / "corpus", [tmp_path / "absent"])


def test_installed_python_carries_names_and_licences(tmp_path: Path) -> None:
    collect(tmp_path / "corpus", [], installed_python=True, max_file_bytes=3_000, sample_bytes=300_000)
    documents = list(Corpus.open(tmp_path / "corpus"))
    assert len(documents) > 100
    assert any(d.licence for d in documents)
    assert len({d.repository for d in documents}) > 5


def test_unicode_survives(tmp_path: Path) -> None:
    text = "s = 'naïve 🦜 \u2028 \\x00'\n"
    file = tmp_path / "d.jsonl.gz"
    file.write_bytes(gzip.compress((json.dumps({"content": text}) + "\n").encode()))
    assert [d.text for d in read_local(file)] == [text]


def test_truncated_gzip_is_named(sources: Path, tmp_path: Path) -> None:
    collect(tmp_path / "corpus", [sources])
    (file,) = Corpus.open(tmp_path / "corpus").files
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=f"{file}: not a document: damaged gzip data after line"):
        list(read_local(file))
    with pytest.raises(DataError, match="the manifest says"):
        Corpus.open(tmp_path / "corpus")


def test_a_directory_without_a_manifest_is_not_a_corpus(sources: Path, tmp_path: Path) -> None:
    collect(tmp_path / "corpus", [sources])
    (tmp_path / "corpus" / MANIFEST).unlink()
    with pytest.raises(DataError, match="codeparrot-ds corpus collect"):
        Corpus.open(tmp_path / "corpus")


def test_other_files_are_not_mixed_with_a_corpus(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "setup.py").write_text("mine")
    with pytest.raises(ConfigError, match=r"project: holds other files \(setup\.py\)\. Name another output"):
        collect(tmp_path / "project", [sources])
    assert [path.name for path in (tmp_path / "project").iterdir()] == ["setup.py"]


def test_a_killed_collection_is_finished_in_its_directory(sources: Path, tmp_path: Path) -> None:
    whole = collect(tmp_path / "corpus", [sources])
    (tmp_path / "corpus" / "manifest.json").unlink()
    assert collect(tmp_path / "corpus", [sources]) == whole


def test_a_file_is_not_a_directory_to_collect_from(sources: Path, tmp_path: Path) -> None:
    file = next(path for path in sorted(sources.rglob("*.py")) if path.is_file())
    with pytest.raises(ConfigError, match=r"not a directory\. Name the directory that contains"):
        collect(tmp_path / "corpus", [file])


@pytest.mark.parametrize("suffix", ["*.py", ".py,.js", "a/.py", "", "?y"])
def test_what_is_no_suffix_is_refused(suffix: str, sources: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"suffix {suffix!r}: must be the end of a file name")):
        collect(tmp_path / "corpus", [sources], suffixes=[suffix])
    with pytest.raises(ConfigError, match=re.escape(f"suffix {suffix!r}: must be the end of a file name")):
        search_inputs([str(sources)], suffix)


def test_a_suffix_needs_no_dot_and_a_name_without_one_is_its_own(tmp_path: Path) -> None:
    for name in ("a.py", "happy", "Makefile", "b_test.py", "c.js", "py"):
        (tmp_path / "src" / "d").mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / "d" / name).write_text(f"x = {name!r}\n")
    expected = {
        "py": ["a.py", "b_test.py", "py"],
        ".py": ["a.py", "b_test.py"],
        "Makefile": ["Makefile"],
        "_test.py": ["b_test.py"],
    }
    for suffix, names in expected.items():
        collect(tmp_path / suffix, [tmp_path / "src"], suffixes=[suffix])
        assert sorted(Path(d.path).name for d in Corpus.open(tmp_path / suffix)) == names
        pieces = search_inputs([str(tmp_path / "src")], suffix).pieces
        assert [Path(piece.name).name for piece in pieces] == names
    assert other_suffixes(tmp_path / ".py") == [("without a suffix", 3), (".js", 1)]


def test_the_commands_say_what_is_not_collected_and_that_secrets_are_kept(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for number in range(3):
        text = (
            f'AWS_SECRET_ACCESS_KEY = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYzq8fTk2Lw{number}"\n' + "x = y = z = w = 1\n" * 5
        )
        (tmp_path / "src" / f"{number}.py").write_text(text + f"def f():\n    a = {number}\n")
    (tmp_path / "src" / "app.js").write_text("x\n")
    (tmp_path / "src" / "Makefile").write_text("x\n")
    invoke = CliRunner().invoke
    collected = invoke(app, ["corpus", "collect", str(tmp_path / "src"), "-o", str(tmp_path / "raw")])
    assert "of other suffixes are not collected (.js 1, without a suffix 1). --suffix selects them." in collected.stderr
    for mode, kept in (("report", True), ("redact", False)):
        out = str(tmp_path / mode)
        cleaned = invoke(app, ["corpus", "clean", str(tmp_path / "raw"), "-o", out, "--secrets", mode, "--workers=1"])
        assert "found: key" in cleaned.stdout
        assert ("note: what was found is kept" in cleaned.stderr) is kept

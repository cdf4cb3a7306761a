"""`corpus collect` finds git working trees: repository, licence and commit of each file."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from codeparrot_ds.corpus.collect import collect
from codeparrot_ds.corpus.git import name_of_url, read_checkout
from codeparrot_ds.documents.document import Document
from codeparrot_ds.documents.inputs import Corpus
from codeparrot_ds.errors import DataError
from tests.conftest import ROOT

URL = "https://me:s3cret@github.com/owner/name.git"
APACHE = (ROOT / "LICENSE").read_text()


def git(directory: Path, *arguments: str | Path) -> str:
    """Run the real git, without the user's settings."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("GIT_")},
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        **{f"GIT_{who}_{what}": "t@t.invalid" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    }
    command = ["git", "-c", "protocol.file.allow=always", "-C", str(directory), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def repository(directory: Path, name: str, url: str | None = None, licence: str = "") -> str:
    """Create a repository with one file and one commit. Returns the commit."""
    directory.mkdir(parents=True)
    git(directory, "init", "-q", "-b", "trunk")
    if url is not None:
        git(directory, "remote", "add", "origin", url)
    (directory / f"{name}.py").write_text(f"{name} = 1\n")
    if licence:
        (directory / "LICENSE").write_text(licence)
    git(directory, "add", ".")
    git(directory, "commit", "-q", "-m", name)
    return git(directory, "rev-parse", "HEAD")


def collected(output: Path, *directories: Path) -> dict[str, Document]:
    """Documents of a new corpus by the name that their text assigns."""
    collect(output, directories)
    return {document.text.split()[0]: document for document in Corpus.open(output)}


def facts(document: Document) -> tuple[str, str, str, str]:
    return document.repository, document.path, document.licence, document.commit


def test_files_get_the_provenance_of_the_nearest_working_tree(tmp_path: Path) -> None:
    """A tree in a tree, one without a remote, a packed reference, a detached HEAD, and files outside any tree."""
    src = tmp_path / "src"
    outer = repository(src / "outer", "outer", URL, APACHE)
    inner = repository(src / "outer" / "vendor" / "inner", "inner")
    git(src / "outer" / "vendor" / "inner", "pack-refs", "--all")
    detached = repository(src / "detached", "detached", "git@example.org:team/project.git")
    (src / "detached" / "more.py").write_text("more = 1\n")
    git(src / "detached", "add", ".")
    git(src / "detached", "commit", "-q", "-m", "more")
    git(src / "detached", "checkout", "-q", detached)
    (src / "+before.git.py").write_text("loose = 1\n")  # sorts before ".git"
    (src / "outer" / "+first.py").write_text("first = 1\n")
    (src / "outer" / "below").mkdir()
    (src / "outer" / "below" / "deep.py").write_text("deep = 1\n")
    found = collected(tmp_path / "corpus", src)
    assert {name: facts(document) for name, document in found.items()} == {
        "outer": ("owner/name", "outer.py", "Apache-2.0", outer),
        "first": ("owner/name", "+first.py", "Apache-2.0", outer),
        "deep": ("owner/name", "below/deep.py", "Apache-2.0", outer),
        "inner": ("inner", "inner.py", "", inner),
        "detached": ("example.org/team/project", "detached.py", "", detached),
        "loose": ("src", "+before.git.py", "", ""),
    }
    manifest = json.loads((tmp_path / "corpus" / "manifest.json").read_text())
    assert (manifest["repositories"], manifest["without_commit"]) == (4, 1)
    rejected = [json.loads(line) for line in (tmp_path / "corpus" / "rejected.jsonl").read_text().splitlines()]
    assert {"repository": "owner/name", "path": "LICENSE", "reason": "other suffix"} in rejected
    assert all(b"s3cret" not in file.read_bytes() for file in (tmp_path / "corpus").iterdir())
    assert "s3cret" not in repr(found)


def test_a_directory_in_a_working_tree_belongs_to_it(tmp_path: Path) -> None:
    commit = repository(tmp_path / "tree", "top", URL, APACHE)
    (tmp_path / "tree" / "src" / "a").mkdir(parents=True)
    (tmp_path / "tree" / "src" / "a" / "b.py").write_text("below = 1\n")
    found = collected(tmp_path / "corpus", tmp_path / "tree" / "src")
    assert facts(found["below"]) == ("owner/name", "src/a/b.py", "Apache-2.0", commit)


def test_linked_working_trees_and_submodules(tmp_path: Path) -> None:
    """Their `.git` is a file that leads elsewhere."""
    main = repository(tmp_path / "main", "main", URL)
    git(tmp_path / "main", "worktree", "add", "-q", "-b", "side", tmp_path / "linked")
    (tmp_path / "linked" / "side.py").write_text("side = 1\n")
    git(tmp_path / "linked", "add", ".")
    git(tmp_path / "linked", "commit", "-q", "-m", "side")
    side = git(tmp_path / "linked", "rev-parse", "HEAD")
    library = repository(tmp_path / "library", "library", licence=APACHE)
    git(tmp_path / "main", "submodule", "--quiet", "add", tmp_path / "library", "lib")
    found = collected(tmp_path / "corpus", tmp_path / "main", tmp_path / "linked")
    assert facts(found["library"]) == ("library", "library.py", "Apache-2.0", library)
    assert facts(found["side"]) == ("owner/name", "side.py", "", side)
    assert found["main"].commit == main and main != side


BROKEN: dict[str, dict[str, str | None]] = {
    "an empty file": {".git": ""},
    "no file of git": {".git": "\0\x01 nonsense"},
    "a file that leads nowhere": {".git": "gitdir: ../nowhere\n"},
    "a file that leads to itself": {".git": "gitdir: .git\n"},
    "an empty directory": {".git/x": ""},
    "no commit yet": {".git/HEAD": "ref: refs/heads/trunk\n"},
    "a reference to a file outside": {".git/HEAD": "ref: refs/../../key\n", ".git/refs/x": "", "key": "0" * 40},
    "a reference outside refs": {".git/HEAD": "ref: secret\n", ".git/secret": "0" * 40},
    "a reference to itself": {".git/HEAD": "ref: refs/heads/a\n", ".git/refs/heads/a": "ref: refs/heads/a\n"},
    "a commit that is none": {".git/HEAD": "0" * 39 + "g\n"},
    "a huge HEAD": {".git/HEAD": "0" * 40 + " " * 2_000_000},
    "a huge configuration": {".git/config": f'[remote "origin"]\nurl = {URL}\n' + "#" * 2_000_000},
    "a configuration of nonsense": {".git/config": '[remote "origin\nurl\n= = =\n[[[\nurl = no\n'},
    "a control character": {".git/config": '[remote "origin"]\nurl = https://github.com/o/\x1b[2J\n'},
    "a long name": {".git/config": f'[remote "origin"]\nurl = https://github.com/o/{"n" * 5_000}\n'},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_or_hostile_tree_is_a_directory_like_any_other(name: str, tmp_path: Path) -> None:
    for path, content in BROKEN[name].items():
        (tmp_path / "tree" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / path).write_text(content or "")
    (tmp_path / "tree" / "a.py").write_text("a = 1\n")
    found = collected(tmp_path / "corpus", tmp_path)
    assert facts(found["a"]) == ("tree", "a.py", "", "")


def test_pipes_and_links_are_not_waited_for(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / ".git" / "refs").mkdir(parents=True)
    os.mkfifo(tree / ".git" / "config")
    os.mkfifo(tree / ".git" / "packed-refs")
    (tree / ".git" / "HEAD").symlink_to("HEAD")
    assert read_checkout(tree).commit == ""
    (tree / ".git" / "HEAD").unlink()
    (tree / ".git" / "HEAD").write_text("ref: refs/heads/trunk")
    assert (read_checkout(tree).repository, read_checkout(tree).commit) == ("tree", "")


@pytest.mark.parametrize(
    ("config", "repository"),
    [
        ('[remote "up"]\n\turl = https://github.com/a/up\n[remote "origin"]\n\turl = https://github.com/a/b\n', "a/b"),
        ('[remote "x"]\nurl = https://github.com/a/x\n[remote "y"]\nurl = https://github.com/a/y\n', "a/x"),
        ('[remote "origin"]\nurl = https://github.com/a/1\nurl = https://github.com/a/2\n', "a/1"),
        ('[REMOTE "origin"] URL="https://github.com/a/b" ; comment\n', "a/b"),
        ('[remote "origin"]\n\turl = https://github.com/a/b # comment\n\tfetch = +refs/*\n', "a/b"),
        ('[remote "origin"]\n\turl = https://github.com/a/\\\nb\n', "a/b"),
        ('[url "https://github.com/no/no"]\n\tinsteadOf = x\n[branch "origin"]\n\tremote = z\n', "tree"),
        ("[core]\n\turl = https://github.com/no/no\n", "tree"),
    ],
)
def test_the_configuration_is_read_as_git_does(config: str, repository: str, tmp_path: Path) -> None:
    (tmp_path / "tree" / ".git").mkdir(parents=True)
    (tmp_path / "tree" / ".git" / "config").write_text(config)
    assert read_checkout(tmp_path / "tree").repository == repository


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://github.com/owner/name.git", "owner/name"),
        ("https://user:token@github.com/owner/name", "owner/name"),
        ("https://token@www.GitHub.com:443/owner/name/?private_token=x#y", "owner/name"),
        ("git@github.com:owner/name.git", "owner/name"),
        ("github.com:owner/name", "owner/name"),
        ("ssh://git@github.com:22/owner/name.git", "owner/name"),
        ("https://oauth2:glpat-x@gitlab.com/group/sub/name.git", "gitlab.com/group/sub/name"),
        ("user:pass@host.example:path/name", "host.example/path/name"),
        ("git@[2001:db8::1]:team/name.git", "[2001:db8::1]/team/name"),
        ("file:///home/me/private/name.git", "name"),
        ("/home/me/private/name.git/", "name"),
        ("../name", "name"),
        (r"C:\Users\me\name", "name"),
        ("ext::sh -c 'echo token'", ""),
        ("https://[broken/x", ""),
        ("https://github.com/", ""),
        ("..", ""),
        ("", ""),
    ],
)
def test_a_name_has_no_credentials_and_no_directories(url: str, name: str) -> None:
    assert name_of_url(url) == name


def test_another_commit_or_licence_is_another_corpus(tmp_path: Path) -> None:
    repository(tmp_path / "tree", "a", URL, APACHE)
    collect(tmp_path / "corpus", [tmp_path / "tree"])
    collect(tmp_path / "corpus", [tmp_path / "tree"])
    git(tmp_path / "tree", "commit", "-q", "--allow-empty", "-m", "more")
    with pytest.raises(DataError, match=r"1 changed: .*tree \(repository, commit, licence\)"):
        collect(tmp_path / "corpus", [tmp_path / "tree"])


def test_several_suffixes_are_collected(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for name in ("a.py", "b.pyi", "c.txt"):
        (tmp_path / "src" / name).write_text(f"{name[0]} = 1\n")
    manifest = collect(tmp_path / "corpus", [tmp_path / "src"], suffixes=[".pyi", ".py"])
    assert {document.path for document in Corpus.open(tmp_path / "corpus")} == {"a.py", "b.pyi"}
    assert manifest["options"]["suffixes"] == [".py", ".pyi"] and manifest["skipped"] == {"other suffix": 1}
    with pytest.raises(DataError, match=r"no \.x or \.y files found"):
        collect(tmp_path / "none", [tmp_path / "src"], suffixes=[".x", ".y"])

"""Git working trees, read from their files without running git: what the repository is called, and its commit.

A repository may be hostile: only regular files of limited size are read, and nothing in them is executed or followed
beyond the directories that git itself would use.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

GIT = ".git"
_PUBLIC_HOST = "github.com"  # its repositories are called OWNER/NAME in public corpora
_FILE_MAX = 1_000_000  # bytes
_NAME_MAX = 250  # characters
_PACKED_MAX = 100_000_000  # bytes of packed-refs, which has a line per branch and tag
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_REFERENCE = re.compile(r"ref:\s*(refs/\S+)")
_REFERENCES_MAX = 5  # symbolic references one after the other
_SECTION = re.compile(r'\[\s*([\w.-]+)(?:\s+"((?:[^"\\]|\\.)*)")?\s*\]\s*(.*)')
_URL = re.compile(r"url\s*=\s*(.*)", re.IGNORECASE)
_VALUE = re.compile(r'"((?:[^"\\]|\\.)*)"|([^"#;]+)')
_REMOTE = re.compile(r"(?:[^@/]*@)?(\[[^\]]*\]|[^:/\\]{2,}):(?!/)(.*)", re.DOTALL)  # [USER@]HOST:PATH, as for ssh
_HELPER = re.compile(r"[\w+.-]+::")  # names the program that fetches from what follows


@dataclass(frozen=True)
class Checkout:
    """A git working tree.

    Attributes:
        root: its directory.
        repository: name of the repository: OWNER/NAME on GitHub, HOST/PATH elsewhere, or the name of the directory.
        commit: the commit that is checked out, in hex; "" if there is none or it cannot be read.
    """

    root: Path
    repository: str
    commit: str


def read_checkout(root: Path) -> Checkout:
    """Read the working tree at `root` as far as it can be read. Without `.git` it is a directory like any other."""
    own = _git_directory(root)
    common = own
    if (shared := _read(own / "commondir").strip()) and "\0" not in shared:  # of a linked working tree
        common = own / shared
    return Checkout(root, _repository(_read(common / "config")) or root.name, _commit(own, common))


def enclosing_root(directory: Path) -> Path | None:
    """The nearest directory at or above an absolute path that contains `.git`, or None."""
    return next((each for each in (directory, *directory.parents) if _exists(each / GIT)), None)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _git_directory(root: Path) -> Path:
    """The directory of the repository's data: `.git`, or what a file of this name leads to."""
    named = _read(root / GIT).strip()
    path = named.removeprefix("gitdir:").strip()
    return root / path if named.startswith("gitdir:") and path and "\0" not in path else root / GIT


def _read(path: Path, most: int = _FILE_MAX) -> str:
    """Text of a regular file of limited size, or ""."""
    try:
        if not path.is_file() or path.stat().st_size > most:
            return ""
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _commit(own: Path, common: Path) -> str:
    """The commit of HEAD, through references in files of their own or in the list of packed ones."""
    content = _read(own / "HEAD").strip()
    for _ in range(_REFERENCES_MAX):
        if _COMMIT.fullmatch(content):
            return content
        match = _REFERENCE.fullmatch(content)
        if match is None or ".." in match[1]:
            return ""
        name = match[1]
        content = _read(own / name).strip() or _read(common / name).strip() or _packed(common, name)
    return ""


def _packed(common: Path, name: str) -> str:
    """The commit of a reference in `packed-refs`: lines of commit and name."""
    lines = _read(common / "packed-refs", _PACKED_MAX).splitlines()
    return next((commit for commit, _, each in (line.partition(" ") for line in lines) if each.strip() == name), "")


def _repository(config: str) -> str:
    """Name of the repository according to its configuration: from the URL of `origin`, or of the first remote."""
    urls: dict[str, str] = {}
    for remote, url in _remotes(config):
        urls.setdefault(remote, url)  # of several URLs of a remote, git fetches from the first
    return name_of_url(urls.get("origin", next(iter(urls.values()), "")))


def _remotes(config: str) -> Iterator[tuple[str, str]]:
    """Name and URL of the remotes, in order."""
    remote = None
    for line in config.replace("\\\n", "").splitlines():
        stripped = line.strip()
        if section := _SECTION.fullmatch(stripped):
            remote = section[2] if section[1].lower() == "remote" else None
            stripped = section[3]
        if remote is not None and (url := _URL.fullmatch(stripped)):
            yield remote, _value(url[1])


def _value(written: str) -> str:
    """A value of a configuration file without quotation marks and comments."""
    parts, at = [], 0
    while match := _VALUE.match(written, at):
        parts.append(match[1] if match[1] is not None else match[2])
        at = match.end()
    return re.sub(r"\\(.)", r"\1", "".join(parts)).strip()


def name_of_url(url: str) -> str:
    """Name of the repository at a URL, without user, password, port, query and the directories of local paths.

    OWNER/NAME on GitHub, HOST/PATH elsewhere, the last part of a local path, and "" if it has no name.
    """
    if _HELPER.match(url):
        return ""
    if "://" in url:
        try:
            parts = urlsplit(url)
            host, path = parts.hostname or "", parts.path
        except ValueError:
            return ""
        host = "" if parts.scheme.lower() == "file" else host
    elif match := _REMOTE.fullmatch(url):
        host, path = match[1].lower(), match[2]
    else:
        host, path = "", url.replace("\\", "/")
    names = [name for name in PurePosixPath(path.strip("/").removesuffix(".git")).parts if name not in ("..", "/")]
    if not names:
        return ""
    if not host:
        names = names[-1:]
    elif host.removeprefix("www.") != _PUBLIC_HOST:
        names = [host, *names]
    name = "/".join(names)
    return name if len(name) <= _NAME_MAX and name.isprintable() else ""

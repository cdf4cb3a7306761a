"""Licences: which one a text, a directory or a wording names, and whether it is permissive."""

import configparser
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from codeparrot_ds.corpus.extra import import_extra
from codeparrot_ds.corpus.options import Licences

# Licences that ask for little more than keeping their notice; whatever is derived may be under any terms. Left out:
# BSD-4-Clause (to be named in advertisements), Artistic, EPL and MPL (changed files stay under them), CC-BY (not meant
# for code), "public domain" (its meaning depends on the country).
PERMISSIVE = {
    "0BSD", "AFL-3.0", "Apache-1.1", "Apache-2.0", "BlueOak-1.0.0", "BSD-1-Clause", "BSD-2-Clause",
    "BSD-2-Clause-Patent", "BSD-2-Clause-Views", "BSD-3-Clause", "BSD-3-Clause-Clear", "BSD-3-Clause-LBNL",
    "BSD-3-Clause-Open-MPI", "BSL-1.0", "CC0-1.0", "CNRI-Python", "curl", "ECL-2.0", "HPND", "ICU", "ISC",
    "libpng-2.0", "MIT", "MIT-0", "MIT-CMU", "MulanPSL-2.0", "NCSA", "PostgreSQL", "PSF-2.0", "Python-2.0",
    "Python-2.0.1", "Unicode-3.0", "Unicode-DFS-2016", "Unlicense", "UPL-1.0", "WTFPL", "X11", "Zlib",
}  # fmt: skip
_EXCEPTION = "withllvmexception"  # grants further rights, whereas "with Commons Clause" takes rights away
_NOISE = re.compile(r"\b(?:licen[sc]ed?|the|version|software|under|v\.?(?=[ 0-9]))(?![a-z])|[\s,\"'_\-]+")
_WORDINGS = {
    "apache": "Apache-2.0",
    "apache2": "Apache-2.0",
    "asl2": "Apache-2.0",
    "asl2.0": "Apache-2.0",
    "2clausebsd": "BSD-2-Clause",
    "bsd2": "BSD-2-Clause",
    "bsd2clausesimplified": "BSD-2-Clause",
    "freebsd": "BSD-2-Clause",
    "simplifiedbsd": "BSD-2-Clause",
    "3clausebsd": "BSD-3-Clause",
    "bsd": "BSD-3-Clause",  # says neither two nor three clauses; both are permissive
    "bsd3": "BSD-3-Clause",
    "bsd3clauseneworrevised": "BSD-3-Clause",
    "modifiedbsd": "BSD-3-Clause",
    "newbsd": "BSD-3-Clause",
    "revisedbsd": "BSD-3-Clause",
    "boost1.0": "BSL-1.0",
    "cc01.0universal": "CC0-1.0",
    "cc01.0universal(cc01.0)publicdomaindedication": "CC0-1.0",
    "expat": "MIT",
    "mit/x11": "MIT",
    "mitnoattribution": "MIT-0",
    "historicalpermissionnoticeanddisclaimer": "HPND",
    "psf": "PSF-2.0",
    "psfl": "PSF-2.0",
    "pythonfoundation": "PSF-2.0",
    "universalpermissive": "UPL-1.0",
    "universityofillinois/ncsaopensource": "NCSA",
    "zlib/libpng": "Zlib",
}
_NAMES = {_NOISE.sub("", name.lower()): name for name in PERMISSIVE} | _WORDINGS
_ABBREVIATION = re.compile(r"(.*\S)\s*\(([^()]*)\)")  # "The MIT License (MIT)"
_ABBREVIATIONS = {"iscl", "2clause", "3clause", "new", "revised", "simplified", "modified"}
_TROVE = re.compile(r"\s*License\s*::(?:[^,;]*::)?\s*")
_OR = re.compile(r"\s+or\s+|\|", re.IGNORECASE)
_AND = re.compile(r"\s+and\s+|[,;&]", re.IGNORECASE)
_INNERMOST = re.compile(r"\(([^()]*)\)")
_WORDING_MAX = 500  # characters; a longer wording is a text

_HOLDERS = re.compile(
    r"(?im)^[ \t#*/;.-]*(?:copyright\b|\(c\)|©).*\b[12][0-9]{3}\b.*$|^[ \t#*/;.-]*all rights reserved\.?$"
)
# Said outside the texts of known licences, this may take away what they grant.
_FURTHER_TERMS = re.compile(
    r"(?i)commons\s+clause|non-?commercial|copyleft|general\s+public\s+licen[sc]e|not\s+be\s+(?:sold|used)\b|"
    r"(?:additional|further|following)\s+(?:restriction|condition|limitation|term)s?|(?:research|academic)\s+(?:use|purposes?)\s+only"
)
FURTHER_TERMS = "LicenseRef-further-terms"
_TAG = re.compile(r"SPDX-License-Identifier:[ \t]*([\w.+() -]+)")
_LATER = ("-or-later", "-only")
_FILE = re.compile(r"(?i)(?:(?:un)?licen[sc]es?|(?:mit|bsd|apache|gpl|lgpl)[-_]licen[sc]e|copying)(?:[-_.][\w.-]*)?")
_CODE = {
    ".c", ".cfg", ".go", ".h", ".ipynb", ".java", ".js", ".json", ".pl", ".py", ".rb", ".sh", ".toml", ".ts", ".xml",
    ".yaml", ".yml",
}  # fmt: skip
_ALTERNATIVE = re.compile(r"(?i)licen[sc]e[-_.](?:apache|mit|bsd|zlib|unlicense|boost|0bsd|isc)[\w.-]*")
_FILE_MAX = 1_000_000  # bytes
_CACHED = 4096
_identified: dict[bytes, str] = {}


def identify(text: str) -> str:
    """Which licence a text is, or the licences that it consists of.

    Results are cached by the digest of the text: most repositories have one of a few texts.

    Returns:
        An SPDX identifier, several joined by " AND ", or "" if more than a quarter of the text is something else, no
        licence that is not permissive is in it, and neither an SPDX tag nor a usual name says what it is.
        `FURTHER_TERMS` is one of several if the rest of the text seems to restrict the licence, such as the Commons
        Clause.

    Raises:
        ConfigError: the extra `corpus` is not installed.
    """
    digest = xxhash.xxh3_128_digest(text.encode())
    if digest not in _identified:
        if len(_identified) >= _CACHED:
            _identified.clear()
        _identified[digest] = _identify(text)
    return _identified[digest]


def _identify(text: str) -> str:
    library = import_extra("licenseclassifier", "licenseclassifier", "The identification of licences")
    results = library.identify_license(text)
    if not results:
        text = _HOLDERS.sub("", text)
        results = library.identify_license(text)
    mentioned = [] if results else library.identify_license(text, 0.0)
    if not PERMISSIVE.issuperset(each.id for each in mentioned):
        results = mentioned  # "contains a version of X, which is under the MPL"
    found = list(dict.fromkeys(each.id for each in results))
    # The text of the GPL ends with a notice for those who use it, "or any later version".
    base = [each for each in found if not each.endswith(_LATER)]
    found = [each for each in found if each in base or not any(each.startswith(f"{one}-") for one in base)]
    if found and PERMISSIVE.issuperset(found) and _FURTHER_TERMS.search(_without(text, results)):
        found.append(FURTHER_TERMS)
    if not found and (tag := _TAG.search(text)):
        return tag.group(1).strip(" -")
    return " AND ".join(found) or _find_name(text.strip())


def _without(text: str, results: list[Any]) -> str:
    """What is left of a text without the licences in it."""
    parts, end = [], 0
    for each in sorted(results, key=lambda result: int(result.start)):
        parts.append(text[end : each.start])
        end = max(end, each.end)
    return "\n".join([*parts, text[end:]])


def is_permissive(wording: str) -> bool:
    """Whether an SPDX identifier or expression, a trove classifier or a usual wording names permissive licences only.

    Of alternatives ("MIT OR GPL-2.0", "MIT/Apache-2.0") one must be permissive; of several licences
    ("MIT AND GPL-2.0", "MIT, GPL") all.
    """
    return _evaluate(wording, lambda name: _find_name(name) in PERMISSIVE)


def is_allowed(licence: str, rules: Licences) -> bool:
    """Whether the rules keep a document with this licence: an expression, a wording, or a whole text.

    Raises:
        ConfigError: `licence` is a text and the extra `corpus` is not installed.
    """
    if rules.allowed == "any":
        return True
    if len(licence) > _WORDING_MAX:
        licence = identify(licence)
    if not licence.strip():
        return rules.unknown
    if rules.allowed == "permissive":
        return is_permissive(licence)
    listed = {_key(name) for name in rules.allowed}
    return _evaluate(licence, lambda name: _key(name) in listed or _key(_find_name(name) or name) in listed)


def _evaluate(wording: str, accepts: Callable[[str], bool]) -> bool:
    """Evaluate an expression of licences. "/" (as in Cargo.toml) binds more tightly than AND, and AND than OR."""
    wording = wording.replace("\0", "")
    if len(wording) > _WORDING_MAX:
        return False
    if accepts(wording):
        return True

    def flat(expression: str) -> bool:
        return any(all(map(holds, _AND.split(alternative))) for alternative in _OR.split(expression))

    def holds(name: str) -> bool:
        return name.strip() == "\0" or any(map(accepts, name.split("/")))

    while inner := _INNERMOST.search(wording):
        value = "\0" if flat(inner.group(1)) else "refused"
        wording = wording[: inner.start()] + value + wording[inner.end() :]
    return flat(wording)


def _key(name: str) -> str:
    """A name without case, punctuation and the words that say nothing."""
    return _NOISE.sub("", name.lower())


def _find_name(name: str) -> str:
    """SPDX identifier of the permissive licence that `name` stands for, or ""."""
    if len(name) > _WORDING_MAX:
        return ""
    name = _without_trove(name)
    key = _key(name).removesuffix("+")
    if found := _NAMES.get(key.removesuffix(_EXCEPTION)):
        return found
    match = _ABBREVIATION.fullmatch(name)
    if match and (_key(match.group(2)) in _NAMES or _key(match.group(2)) in _ABBREVIATIONS):
        return _NAMES.get(_key(match.group(1)), "")
    return ""


def _without_trove(name: str) -> str:
    """The last part of a trove classifier; other names as they are."""
    return _TROVE.sub("", name, count=1).strip() if _TROVE.match(name) else name.strip()


def find_licence(directory: Path) -> str:
    """Licence of a repository, from the files in its root; "" if none says it.

    Licence files count first (LICENSE, COPYING, UNLICENSE and their variants, then `LICENSES/`), then what
    pyproject.toml, setup.cfg, package.json or Cargo.toml declare. Several files make an expression: alternatives if
    each is named after a permissive licence, as in LICENSE-MIT beside LICENSE-APACHE, or else all of them apply, also
    those that are not known (`FURTHER_TERMS`). Symbolic links and files over 1 MB are not read.

    Raises:
        ConfigError: the extra `corpus` is not installed.
    """
    try:
        paths = sorted(directory.iterdir())
    except OSError:
        return ""
    files = [path for path in paths if _FILE.fullmatch(path.name) and path.suffix.lower() not in _CODE]
    texts = {path.name: _read(path) for path in files}
    found = {name: licence for name, text in texts.items() if (licence := identify(text))}
    if found:
        alternatives = all(map(_ALTERNATIVE.fullmatch, found))
        parts = list(dict.fromkeys(found.values()))
        if not alternatives and any(len(texts[name]) > _WORDING_MAX for name in texts.keys() - found.keys()):
            parts.append(FURTHER_TERMS)
        return _join(" OR " if alternatives else " AND ", parts)
    try:
        listed = sorted(path.stem for path in (directory / "LICENSES").iterdir())  # named by SPDX: reuse.software
    except OSError:
        listed = []
    if listed:
        return " AND ".join(listed)
    wording = next((text for text in map(str.strip, _declared(directory)) if text), "")
    return (_find_name(wording) or wording) if len(wording) <= _WORDING_MAX else identify(wording)


def _join(operator: str, parts: Sequence[str]) -> str:
    """Join expressions, with parentheses around those that have operators themselves."""
    return parts[0] if len(parts) == 1 else operator.join(f"({part})" if " " in part else part for part in parts)


def _read(path: Path) -> str:
    """Text of a small regular file, or ""."""
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > _FILE_MAX:
            return ""
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _declared(directory: Path) -> Iterator[str]:
    """What the metadata of packages in `directory` say about the licence."""
    project = _table(_parse(directory / "pyproject.toml", tomllib.loads))
    for table in (_table(project.get("project")), _table(_table(project.get("tool")).get("poetry"))):
        licence = table.get("license")
        yield from _texts(licence, _table(licence).get("text"))
        classifiers = table.get("classifiers")
        yield _classified(_texts(*(classifiers if isinstance(classifiers, list) else [])))
    settings = configparser.ConfigParser(interpolation=None)
    _parse(directory / "setup.cfg", settings.read_string)
    yield settings.get("metadata", "license", fallback="")
    yield _classified(settings.get("metadata", "classifiers", fallback="").splitlines())
    package = _table(_parse(directory / "package.json", json.loads))
    yield from _texts(package.get("license"), _table(package.get("license")).get("type"))
    yield from _texts(_table(_table(_parse(directory / "Cargo.toml", tomllib.loads)).get("package")).get("license"))


def _parse(path: Path, parse: Callable[[str], Any]) -> Any:
    """Contents of a metadata file; None if it is missing or broken, which is no matter of ours."""
    try:
        return parse(_read(path))
    except (ValueError, RecursionError, configparser.Error):
        return None


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _texts(*values: Any) -> Iterator[str]:
    return (value for value in values if isinstance(value, str))


def _classified(classifiers: Iterable[str]) -> str:
    """The licences among trove classifiers, which do not say whether several are alternatives: all of them apply."""
    names = [_without_trove(text) for text in classifiers if _TROVE.match(text)]
    return " AND ".join(_find_name(name) or name for name in names if name != "OSI Approved")

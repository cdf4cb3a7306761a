"""The documentation as data: its pages, headings, links, code blocks and commands."""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import typer

from codeparrot_ds.cli import app
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
_SEPARATORS = {"|", "&&", "||", ";", "&"}
_PLACEHOLDER = re.compile(r"…|\.\.\.")


class Link(NamedTuple):
    """A link of a page: its text and its target, as written."""

    page: Path
    text: str
    target: str


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in any of `languages`."""
    return [body for language, body in _FENCED.findall(page.read_text(encoding="utf-8")) if language in languages]


def links(page: Path) -> list[Link]:
    """Links and images of a page, without those in code."""
    prose = _INLINE.sub(lambda code: code[0].replace("](", "] ("), _FENCED.sub("", page.read_text(encoding="utf-8")))
    return [Link(page, *found) for found in re.findall(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)", prose)]


@cache
def anchors(page: Path) -> frozenset[str]:
    """Anchors of the headings of a page, as GitHub makes them."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", _FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        found.append(f"{name}-{found.count(name)}" if name in found else name)
    return frozenset(found)


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command in the page's shell blocks, and of each `codeparrot-ds` command in its prose."""
    text = page.read_text(encoding="utf-8")
    for block in blocks(page, "sh", "bash"):
        yield from _commands(block)
    for _, code in _INLINE.findall(_FENCED.sub("", text)):
        if code.startswith("codeparrot-ds ") and not _PLACEHOLDER.search(code):
            yield from _commands(" ".join(code.split()))


def _commands(script: str) -> Iterator[list[str]]:
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        words.whitespace_split = True
        command: list[str] = []
        for word in [*words, ";"]:
            if word not in _SEPARATORS:
                command.append(word)
                continue
            while command and re.fullmatch(r"\w+=.*", command[0]):  # variables of this command
                command = command[1:]
            if command:
                yield command
            command = []


def usage_problem(words: list[str]) -> str | None:
    """Why `codeparrot-ds` would refuse these words as wrong usage, or None. Values are not judged, nothing is run."""
    command: Any = typer.main.get_command(app)
    words = words[1:]
    while hasattr(command, "commands"):
        if not words:
            return None  # the name of a group
        if words[0].startswith("-"):
            return None if words in (["--help"], ["--version"]) else f"no option {words[0]}"
        if words[0] not in command.commands:
            return f"no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    if not words or "--help" in words:
        return None  # the name of a command in prose
    try:
        parser = command.make_parser(command.context_class(command, info_name="x"))
        values, rest, _ = parser.parse_args(list(words))
    except Exception as error:  # typer's own copy of click's exceptions
        return str(getattr(error, "message", repr(error)))
    if rest:
        return f"unexpected {rest[0]}"
    missing = [each.name for each in command.params if each.required and not values.get(each.name)]
    return f"missing {missing[0]}" if missing else None

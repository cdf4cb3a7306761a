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


def code_spans(text: str) -> list[str]:
    """The code in a line of Markdown."""
    return [code.strip() if len(ticks) > 1 else code for ticks, code in _INLINE.findall(text)]


def sections(page: Path) -> list[tuple[str, str]]:
    """Heading and text of each part of a page, without what stands before the first `##`."""
    parts = re.split(r"^## (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def tables(page: Path | str) -> list[list[list[str]]]:
    """The tables of a page or of a text: rows of cells, the header first."""
    text = _FENCED.sub("", page.read_text(encoding="utf-8") if isinstance(page, Path) else page)
    found = []
    for lines in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in lines.strip().splitlines()]
        found.append([[cell.strip() for cell in row] for row in (rows[0], *rows[2:])])
    return found


@cache
def anchors(page: Path) -> frozenset[str]:
    """Anchors of the headings of a page, as GitHub makes them."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", _FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        found.append(f"{name}-{found.count(name)}" if name in found else name)
    return frozenset(found)


def commands(page: Path) -> Iterator[tuple[list[str], bool]]:
    """The words of each command, and whether it is in a shell block: in prose, `codeparrot-ds` commands only."""
    text = page.read_text(encoding="utf-8")
    for block in blocks(page, "sh", "bash"):
        yield from ((words, True) for words in _commands(block))
    for _, code in _INLINE.findall(_FENCED.sub("", text)):
        if code.startswith("codeparrot-ds ") and not _PLACEHOLDER.search(code):
            yield from ((words, False) for words in _commands(" ".join(code.split())))


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


@cache
def _command_line() -> Any:
    return typer.main.get_command(app)


def usage_problem(words: list[str], complete: bool = True) -> str | None:
    """Why `codeparrot-ds` would refuse these words as wrong usage, or None. Values are not judged, nothing is run.

    Args:
        words: the command line.
        complete: whether it has to have all arguments, as in a block; not in prose.
    """
    command, words = _command_line(), words[1:]
    while hasattr(command, "commands"):
        if not words:
            return None  # the name of a group
        if words[0].startswith("-"):
            own = {"--help", *(option for each in command.params for option in each.opts)}
            return None if words[0] in own else f"no option {words[0]}"
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
    return f"missing {missing[0]}" if missing and complete else None

"""docs/commands.md: every command with its arguments, options and exit codes.

Write the page by `python -m tests.unit.test_commands_page > docs/commands.md`.
"""

import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from codeparrot_ds import cli, errors
from codeparrot_ds.cli import app
from codeparrot_ds.errors import EXIT_CODES, EXIT_CRASHED
from tests.conftest import ROOT

_WIDTH = 120  # of a line in docs/
_KINDS = {str: "text", int: "integer", float: "number", Path: "path"}
_INTRODUCTION = (
    "Generated from the code by `python -m tests.unit.test_commands_page > docs/commands.md`; a test compares them. "
    "`codeparrot-ds --help` lists the commands; `--help` after a command lists its options. Messages and "
    "progress go to standard error, results to standard output; with `--json`, standard output holds one JSON value. "
    "An option given twice is an error, unless it may be repeated. `~` in a path is the home directory. "
    "`codeparrot-ds --install-completion` sets up completion of commands, options, recipes and their keys in bash, zsh "
    "or fish."
)
_EXIT_CODES = (
    "With 1, standard error holds one message that begins with `error:` and says what is wrong, where, and how to mend "
    "it; `plan` also exits with 1 if the run does not fit, `compare` if the runs differ, `doctor` if a check fails. "
    "With 70 it holds a traceback, or `launch` has given up after `--max-restarts` restarts. With 75 the same command "
    "resumes the run, so a scheduler may requeue the job. `deepspeed` changes some exit codes of its ranks, so "
    "`status.json` in the run directory is authoritative for a bare `deepspeed` command. Other codes come from a "
    "signal (128 and its number) or from the operating system."
)
_TRAIN = """## deepspeed --module codeparrot_ds.train

    deepspeed [--hostfile HOSTFILE] --module codeparrot_ds.train RECIPE [--set KEY=VALUE ...]

The program of every rank, which `launch` starts and supervises. Its exit codes are those above."""


def page() -> str:
    """docs/commands.md."""
    lines = ["# Commands", "", textwrap.fill(_INTRODUCTION, _WIDTH, break_on_hyphens=False), "", *overview(), ""]
    lines += ["## Exit codes", "", "| code | meaning |", "|---|---|"]
    lines += [f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items()]
    lines += ["", textwrap.fill(_EXIT_CODES, _WIDTH, break_on_hyphens=False)]
    for words, command in every_command():
        lines += ["", *described(words, command)]
    return "\n".join([*lines, "", _TRAIN]) + "\n"


def every_command() -> Iterator[tuple[str, Any]]:
    """Each command that runs something, in the order of `codeparrot-ds --help`."""
    top: Any = typer.main.get_command(app)
    for name in top.list_commands(None):
        command = top.commands[name]
        below = getattr(command, "commands", None)
        yield from ((f"{name} {each}", below[each]) for each in below) if below else [(name, command)]


def overview() -> Iterator[str]:
    """A table of the commands, by stage."""
    yield from ("| | |", "|---|---|")
    for words, command in every_command():
        anchor, text = f"codeparrot-ds-{words.replace(' ', '-')}", summary(command).partition(". ")[0].rstrip(".")
        yield f"| [`{words}`](#{anchor}) | {text} |"


def summary(command: Any) -> str:
    """What a command does, on one line."""
    return " ".join(inspect.cleandoc(command.help).split())


def described(words: str, command: Any) -> Iterator[str]:
    """The section of a command."""
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option"]
    usage = " ".join(f"{each.name.upper()}{' ...' if each.nargs == -1 else ''}" for each in arguments)
    hints = typing.get_type_hints(command.callback)
    yield from (f"## codeparrot-ds {words}", "", textwrap.fill(summary(command), _WIDTH, break_on_hyphens=False), "")
    yield from (f"    codeparrot-ds {words} {usage}".rstrip() + " [OPTIONS]", "")
    yield from ("| | value | default | |", "|---|---|---|---|")
    for each in [*arguments, *options]:
        name = each.name.upper() if each.param_type_name == "argument" else ", ".join(sorted(each.opts))
        shown = f"{name}, {', '.join(each.secondary_opts)}" if each.secondary_opts else name
        value, default = kind(hints[each.name]), ""
        if each.required:
            default = "required"
        elif not getattr(each, "is_flag", False) and each.default is not None:
            default = f"`{each.default}`"
        elif each.secondary_opts:
            default = f"`{(each.opts if each.default else each.secondary_opts)[0]}`"
        yield f"| {', '.join(f'`{part}`' for part in shown.split(', '))} | {value} | {default} | {escaped(each.help)} |"


def escaped(text: str) -> str:
    """Text as Markdown in a table."""
    return text.replace("|", r"\|").replace("<", r"\<")


def kind(annotation: Any) -> str:
    """The type of a value; nothing for a flag."""
    members = [member for member in typing.get_args(annotation) if member is not type(None)]
    if isinstance(annotation, types.UnionType):
        return kind(members[0])
    if typing.get_origin(annotation) is list:
        return f"{kind(members[0])}, repeatable"
    return _KINDS.get(annotation, "")


def test_the_page_is_current() -> None:
    assert (ROOT / "docs" / "commands.md").read_text(encoding="utf-8") == page()


def test_every_exit_code_is_listed() -> None:
    named = {value for name, value in vars(errors).items() if name.startswith("EXIT_") and isinstance(value, int)}
    assert {0, 2, *named} <= set(EXIT_CODES)


def test_lists_of_commands_show_whole_sentences() -> None:
    """At 80 columns, next to the longest name."""
    lists = [typer.main.get_command(app)]
    for group in lists:
        commands: dict[str, Any] = getattr(group, "commands")  # noqa: B009
        lists += [each for each in commands.values() if hasattr(each, "commands")]
        limit = 80 - 6 - max(map(len, commands))
        cut = {name: text for name, each in commands.items() if "..." in (text := each.get_short_help_str(limit))}
        assert not cut, cut


def test_every_option_says_what_it_is() -> None:
    for words, command in every_command():
        assert summary(command).endswith("."), words
        for each in command.params:
            assert each.help and each.help.rstrip().endswith((".", "]")), (words, each.name)


def test_a_bug_keeps_its_traceback_and_has_its_own_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bug() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "app", bug)
    monkeypatch.setattr(cli, "interrupt_imports", lambda: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == EXIT_CRASHED
    assert "RuntimeError: a bug" in capsys.readouterr().err


if __name__ == "__main__":
    print(page(), end="")

"""Shared by all commands: command groups, results as a table or JSON, and parsing of option values."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from codeparrot_ds.cli.completion import complete_run
from codeparrot_ds.errors import ConfigError
from codeparrot_ds.system.printable import printable

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
ModelArgument = Annotated[
    str,
    typer.Argument(
        help="A run (its newest converted model), a Hugging Face directory, or a model on the Hub.",
        autocompletion=complete_run,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


class _Command(TyperCommand):
    """A command that refuses an option given twice, of which click takes the last, and expands `~` in paths."""

    def make_parser(self, ctx: Any) -> Any:
        """Return click's parser, which lists the parameters in the order of the command line."""
        parser = super().make_parser(ctx)
        if ctx.resilient_parsing:  # the shell asks for completions
            return parser
        parse = parser.parse_args

        def parse_once(args: list[str]) -> Any:
            values, rest, order = parse(args=args)
            for param in {id(param): param for param in order}.values():
                if param.param_type_name == "option" and not param.multiple and order.count(param) > 1:
                    ctx.fail(f"{'/'.join((*param.opts, *param.secondary_opts))}: given twice. Give it once.")
            return values, rest, order

        parser.parse_args = parse_once  # type: ignore[method-assign, unused-ignore]
        return parser

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See click. A shell does not expand `~` in `--output=~/x`, and neither does a scheduler."""
        from codeparrot_ds.system.paths import expand_user

        rest = super().parse_args(ctx, args)
        for name, value in ctx.params.items():
            if isinstance(value, Path):
                ctx.params[name] = expand_user(value)
            elif isinstance(value, list | tuple):
                ctx.params[name] = [expand_user(each) if isinstance(each, Path) else each for each in value]
        return rest


class _Group(typer.Typer):
    """A group whose commands are `_Command`s."""

    def command(self, name: str | None = None, **options: Any) -> Callable[[Any], Any]:
        """See typer."""
        return super().command(name, **{"cls": _Command, **options})


def group(help_text: str, **options: Any) -> typer.Typer:
    """Create a command group; `add_completion=True` for the one that is the command itself."""
    defaults: dict[str, Any] = {
        "no_args_is_help": True,
        "add_completion": False,
        "context_settings": _SETTINGS,
        "rich_markup_mode": None,  # its tables cut off the names of options at 80 columns
        "pretty_exceptions_enable": False,  # several screens for a traceback of a few lines
    }
    return _Group(help=help_text, **{**defaults, **options})


def _print_table(title: str, rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    print(printable(title))
    for name, value in rows:
        print(f"  {printable(name):<{width}}  {printable(value)}")


def print_result(as_json: bool, title: str, rows: list[tuple[str, str]], result: dict[str, Any]) -> None:
    """Print a result as a titled table, or as JSON."""
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        _print_table(title, rows)


def parse_size(text: str) -> int:
    """Parse "30MB", "32kB", "5GB" or "1000" into bytes. Raises ConfigError."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return int(TypeAdapter(ByteSize).validate_python(text.strip()))
    except ValidationError:
        raise ConfigError(f"size {text!r}: write it like 30MB, 5GB or 32kB.") from None


def parse_bandwidth(text: str) -> float:
    """Parse "200Gb" or "800Mb" (bits per second, as networks are rated) into bytes per second. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MG])(?:b|bps|b/s|bit|bit/s)", text.strip())
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"network {text!r}: write it in bits per second, like 200Gb or 800Mb.")
    return float(match[1]) * {"M": 1e6, "G": 1e9}[match[2]] / 8


def parse_steps(text: str) -> tuple[int, int | None]:
    """Parse "100:200", "100:", ":200" or ":" into (first, end), where an open end is None. Raises ConfigError."""
    match = re.fullmatch(r"(\d*):(\d*)", text.strip())
    first, end = (int(match[1] or 0), int(match[2]) if match[2] else None) if match else (0, 0)
    if end is not None and end <= first:
        raise ConfigError(f"steps {text!r}: write them like 100:200, 100: or :200, with the first below the second.")
    return first, end


def without_option(arguments: list[str], name: str) -> list[str]:
    """Return command-line `arguments` without the option `name` and its value."""
    kept, words = [], iter(arguments)
    for word in words:
        if word == name:
            next(words, None)
        elif not word.startswith(f"{name}="):
            kept.append(word)
    return kept

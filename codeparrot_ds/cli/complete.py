"""The `codeparrot-ds complete` command."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from codeparrot_ds.cli.output import JsonOption, ModelArgument, printable
from codeparrot_ds.errors import ConfigError

if TYPE_CHECKING:
    from codeparrot_ds.evaluation.complete import Piece, Prompt

_COLOURS = {"auto": None, "always": True, "never": False}


def complete_command(
    model: ModelArgument,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts; - (the default) reads one from standard input.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Complete this file instead, at the end of --line.")] = None,
    line: Annotated[int | None, typer.Option(help="Line of the file, from 1. Default: the last.", min=1)] = None,
    num: Annotated[int, typer.Option(help="Completions per prompt.", min=1)] = 4,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0 takes the most likely tokens.", min=0.0)
    ] = 0.4,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling threshold.", min=0.01, max=1.0)] = 0.95,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum tokens per completion.", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="Random seed.", min=0)] = 1,
    colour: Annotated[
        str, typer.Option("--color", help="Highlight code: auto (on a terminal), always, never.")
    ] = "auto",
    json_output: JsonOption = False,
) -> None:
    """Complete prompts, showing the text as it is generated. A completion ends where a new top-level block starts."""
    if colour not in _COLOURS:
        raise ConfigError(f"--color {colour!r}: must be {', '.join(_COLOURS)}.")
    if file is not None and prompts:
        raise ConfigError("give prompts or --file, not both.")
    if line is not None and file is None:
        raise ConfigError("--line is a line of --file: name the file.")
    from codeparrot_ds.evaluation.complete import Sampling, complete, encode_prompt, read_prompt
    from codeparrot_ds.evaluation.pretrained import limit_threads, load_pretrained

    texts = [read_prompt(file, line)] if file is not None else [_text_of(prompt) for prompt in prompts or ["-"]]
    sampling = Sampling(num, temperature, top_p, max_new_tokens, seed)
    found = load_pretrained(model, fp32=False)
    limit_threads(found)
    wanted = _COLOURS[colour]
    highlight = sys.stdout.isatty() if wanted is None else wanted
    results: list[dict[str, Any]] = []
    for text in texts:
        prompt = encode_prompt(found, text, max_new_tokens)
        _note(prompt, max_new_tokens)
        if json_output:
            completions = complete(found, prompt, sampling)
        else:
            before = text if file is None else text[text.rfind("\n") + 1 :]  # of a file, only the line is shown
            completions = complete(found, prompt, sampling, _Screen(before, sampling.candidates, highlight).show)
        results.append(
            {
                "prompt": text,
                "prompt_tokens": len(prompt.ids),
                "dropped_tokens": prompt.dropped,
                "completions": [each.text for each in completions],
                "tokens": [len(each.ids) for each in completions],
                "ended": [each.ended for each in completions],
            }
        )
    if json_output:
        print(json.dumps(results, indent=2))


def _text_of(prompt: str) -> str:
    """The text of a prompt argument; "-" is standard input. Raises ConfigError unless it is UTF-8."""
    data = sys.stdin.buffer.read() if prompt == "-" else os.fsencode(prompt)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt is not UTF-8 ({error}). Convert it.") from None


def _note(prompt: "Prompt", max_new_tokens: int) -> None:
    from codeparrot_ds.system.jobs import say

    if prompt.dropped:
        say(
            f"note: the prompt has {len(prompt.ids) + prompt.dropped:,} tokens; only the last {len(prompt.ids):,} are "
            "used, to fit the model's context together with the completion"
        )
    if prompt.new_tokens < max_new_tokens:
        say(f"note: the model's context limits completions to {prompt.new_tokens:,} tokens")


class _Screen:
    """Prints candidates one below the other: the first as it is generated, each other once those above have ended."""

    def __init__(self, prompt: str, candidates: int, highlight: bool) -> None:
        self._prompt, self._candidates = prompt, candidates
        self._waiting: list[list[Piece]] = [[] for _ in range(candidates)]
        self._current = 0
        self._write: Callable[[str, bool], None] = _Highlighted().write if highlight else _plain
        self._highlight = highlight
        self._begin()

    def show(self, piece: "Piece") -> None:
        """Print a piece of the current candidate, or keep it."""
        self._waiting[piece.number].append(piece)
        while self._current < self._candidates and self._waiting[self._current]:
            next_piece = self._waiting[self._current].pop(0)
            self._write(printable(next_piece.text), next_piece.ended is not None)
            if next_piece.ended is not None:
                print(flush=True)
                self._current += 1
                if self._current < self._candidates:
                    self._begin()

    def _begin(self) -> None:
        print(f"--- completion {self._current + 1} of {self._candidates}")
        if self._highlight:
            self._write = _Highlighted().write
        self._write(printable(self._prompt), False)


def _plain(text: str, last: bool) -> None:
    print(text, end="", flush=True)


class _Highlighted:
    """Prints Python in colours. A word is printed once it is complete, because its colour depends on its end."""

    def __init__(self) -> None:
        from pygments.formatters import TerminalFormatter
        from pygments.lexers import PythonLexer

        self._lexer, self._formatter = PythonLexer(stripnl=False, ensurenl=False), TerminalFormatter()
        self._text, self._printed = "", 0

    def write(self, text: str, last: bool) -> None:
        """Add text and print what is complete; everything if it is the last."""
        from pygments import format as render

        self._text += text
        tokens = list(self._lexer.get_tokens_unprocessed(self._text))
        complete = [
            (kind, value[max(0, self._printed - at) :]) for at, kind, value in tokens if at + len(value) > self._printed
        ]
        if not last:
            complete = complete[:-1]
        self._printed += sum(len(value) for _, value in complete)
        print(render(iter(complete), self._formatter), end="", flush=True)

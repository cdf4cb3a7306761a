"""What users and their scripts rely on, pinned: the command line, the functions for scripts, recipe keys, exit codes,
file formats. Internal names may change freely.

A difference is a decision: write it down by `python -m tests.unit.test_public_surface > tests/unit/public_surface.txt`.
"""

import dataclasses
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import codeparrot_ds
from codeparrot_ds import errors
from codeparrot_ds.cli import app
from codeparrot_ds.evaluation.complete import Completion
from codeparrot_ds.evaluation.loss import ValidationLoss
from codeparrot_ds.evaluation.pretrained import Pretrained
from codeparrot_ds.export.certificate import CERTIFICATE
from codeparrot_ds.run.directory import FORMAT_VERSION, Checkpoint, RunDirectory
from codeparrot_ds.run.recipe import Recipe
from codeparrot_ds.shards.sequences import ConcatenatedSequences, Dataset
from codeparrot_ds.system.files import MANIFEST
from tests.conftest import ROOT


def command_line() -> Iterator[str]:
    """Each verb with its arguments and options."""
    yield from verbs(typer.main.get_command(app), ["codeparrot-ds"])


def verbs(command: Any, words: list[str]) -> Iterator[str]:
    """Of a command and those below it."""
    options, arguments = [], []
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            arguments.append(str(parameter.name).upper() + ("..." if parameter.nargs == -1 else ""))
        else:
            options.append("/".join(sorted([*parameter.opts, *parameter.secondary_opts])))
    below = getattr(command, "commands", {})
    if options or not below:
        yield " ".join([*words, *arguments, *sorted(options)])
    for name, verb in sorted(below.items()):
        yield from verbs(verb, [*words, name])


def functions() -> Iterator[str]:
    """What can be imported from the package, and what the functions return has."""
    for name in codeparrot_ds.__all__:
        found = getattr(codeparrot_ds, name)
        if inspect.isfunction(found):
            signature = inspect.signature(found)
            bare = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
            yield name + str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
        else:
            yield name
    for kind in (Dataset, ConcatenatedSequences, Pretrained, Completion, ValidationLoss):
        fields = [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
        yield f"{kind.__name__}: " + ", ".join(sorted({*fields, *(n for n in vars(kind) if not n.startswith("_"))}))


def recipe_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Each key with its default."""
    for name, field in section.model_fields.items():
        kind: Any = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from recipe_keys(kind, f"{prefix}{name}.")
        elif field.default is PydanticUndefined and field.default_factory is None:
            yield f"{prefix}{name} (required)"
        else:
            yield f"{prefix}{name} = {json.dumps(field.get_default(call_default_factory=True), default=str)}"


def exit_codes() -> Iterator[str]:
    """By name."""
    for name, value in sorted(vars(errors).items()):
        if name.startswith("EXIT_"):
            yield f"{name} = {value}"


def formats() -> Iterator[str]:
    """Files by name, and the keys of those that other programs read."""
    yield f"manifest: {MANIFEST}, version {FORMAT_VERSION}; certificate: {CERTIFICATE}"
    run = RunDirectory(Path("RUN"))
    for name in sorted(name for name in dir(RunDirectory) if isinstance(getattr(RunDirectory, name), property)):
        yield f"run directory, {name}: {getattr(run, name)}"
    yield f"checkpoint: {run.checkpoint(7)}, while it is written {run.unfinished(7)}"
    yield "manifest of a checkpoint: " + ", ".join(f.name for f in dataclasses.fields(Checkpoint) if f.name != "path")


def surface() -> str:
    """All of it."""
    parts = {
        "command line": command_line(),
        "functions for scripts": functions(),
        "recipe keys": recipe_keys(),
        "exit codes": exit_codes(),
        "formats": formats(),
    }
    return "\n".join(f"# {title}\n\n" + "".join(f"{line}\n" for line in lines) for title, lines in parts.items())


def test_the_public_surface_is_what_was_agreed() -> None:
    assert surface() == (ROOT / "tests" / "unit" / "public_surface.txt").read_text()


def test_manifests_of_shards_and_corpora_have_the_keys_that_readers_know(data: Path) -> None:
    shards = json.loads((data / "shards" / MANIFEST).read_text())
    assert set(shards) == {
        "format_version", "kind", "dtype", "vocab_size", "eos_id", "tokenizer_digest", "shards", "inputs", "sources",
        "options", "documents", "tokens", "skipped_files",
    }  # fmt: skip
    corpus = json.loads((data / "corpus" / MANIFEST).read_text())
    assert {"format_version", "kind", "files"} <= set(corpus)


if __name__ == "__main__":
    print(surface(), end="")

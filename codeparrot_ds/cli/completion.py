"""What the shell offers on TAB: recipes, recipe keys and runs. Offering nothing lets the shell complete file names.

Options that several commands share are here with their completion.
"""

import os
import re
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from codeparrot_ds.system.paths import expand_user

_REQUEST = "_CODEPARROT_DS_COMPLETE"  # set by the script of --show-completion, see typer.completion
_KEY = "_CODEPARROT_DS_KEY"
_UNQUOTED = re.compile(
    r"[\w.,+@%=-]+"
)  # names that a shell need not quote: none quotes what is offered, and zsh evaluates it
_RUNS = "runs"  # directory of all runs, unless a recipe says otherwise


def drop_keys(environment: MutableMapping[str, str]) -> None:
    """Drop `key` and `=` from the words of `--set key = value`, as which bash passes `--set key=value`.

    Of the value to complete, remember the key, because bash replaces only what follows the `=`.
    """
    if environment.get(_REQUEST) != "complete_bash":
        return
    words, current = environment["COMP_WORDS"].split("\n"), int(environment["COMP_CWORD"])
    for i in reversed(range(2, len(words))):
        if words[i] == "=" and words[i - 2] == "--set":
            if current == i:  # nothing follows yet
                words.insert(i + 1, "")
                current = i + 1
            if current == i + 1:
                environment[_KEY] = words[i - 1]
            del words[i - 1 : i + 1]
            current -= 2 if current > i else 0
    environment.update(COMP_WORDS="\n".join(words), COMP_CWORD=str(current))


def complete_recipe_name(incomplete: str) -> list[str]:
    """Recipes that come with the package."""
    from codeparrot_ds.run.shipped import RECIPES

    return sorted(path.stem for path in RECIPES.iterdir() if path.stem.startswith(incomplete))


def complete_recipe(incomplete: str) -> list[str]:
    """Recipes that come with the package, and YAML files."""
    return complete_recipe_name(incomplete) + [path for path in _paths(incomplete) if path.endswith((".yaml", ".yml"))]


def complete_run(incomplete: str) -> list[str]:
    """Run directories below what is typed, or in `runs`."""
    from codeparrot_ds.run.directory import RunDirectory

    typed = incomplete or f"{_RUNS}/"
    return [path for path in _paths(typed) if RunDirectory(expand_user(Path(path))).recipe.is_file()]


def complete_setting(incomplete: str) -> list[str]:
    """Recipe keys; of a single key also what it may be set to, or its default."""
    values = dict(_recipe_keys())
    if _KEY in os.environ:
        return values.get(os.environ[_KEY], [])
    key = incomplete.partition("=")[0]
    if key != incomplete:
        return [f"{key}={value}" for value in values.get(key, [])]
    keys = [key for key in values if key.startswith(incomplete)]
    # After a single offer a shell adds a space.
    return [f"{key}={value}" for key in keys for value in ("", *(values[key] if len(keys) == 1 else []))]


def _paths(incomplete: str) -> list[str]:
    """Paths that start with what is typed, written the same way; hidden ones only if the dot is typed."""
    directory, slash, name = incomplete.rpartition("/")
    try:
        found = sorted(path.name for path in expand_user(Path(directory + slash or ".")).iterdir())
    except OSError:
        return []
    hidden = name.startswith(".")
    return [
        directory + slash + each
        for each in found
        if each.startswith(name) and each.startswith(".") == hidden and _UNQUOTED.fullmatch(each)
    ]


def _recipe_keys() -> Iterator[tuple[str, list[str]]]:
    """Each key of a recipe with its possible values, or its default."""
    from pydantic import BaseModel

    from codeparrot_ds.run.recipe import Recipe
    from codeparrot_ds.run.shipped import DS_CONFIGS

    def keys(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, list[str]]]:
        for name, field in section.model_fields.items():
            kind: Any = field.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from keys(kind, f"{prefix}{name}.")
            else:
                yield prefix + name, _values(kind, field.default)

    for key, values in keys(Recipe, ""):
        yield key, sorted(path.stem for path in DS_CONFIGS.iterdir()) if key == "engine.deepspeed" else values


def _values(kind: Any, default: Any) -> list[str]:
    if kind is bool:
        return ["true", "false"]
    choices = [value for value in get_args(kind) if isinstance(value, str)]
    return choices or ([str(default)] if isinstance(default, str | int | float | Path) else [])


SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="KEY=VALUE: override a recipe key.", autocompletion=complete_setting),
]
RecipeArgument = Annotated[
    Path,
    typer.Argument(help="Recipe: a file, or a name such as codeparrot-small.", autocompletion=complete_recipe),
]
RunArgument = Annotated[Path, typer.Argument(help="Run directory.", autocompletion=complete_run)]

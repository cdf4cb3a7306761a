"""Recipes and DeepSpeed JSON that come with the package, by name: `codeparrot-small`, `zero3`."""

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
RECIPES, DS_CONFIGS = _PACKAGE / "recipes", _PACKAGE / "ds_configs"
HOSTFILE = _PACKAGE / "hostfile.example"


def names(directory: Path) -> str:
    """The names of the files in RECIPES or DS_CONFIGS, for a message."""
    return ", ".join(sorted(path.stem for path in directory.iterdir()))


def find_recipe(path: Path) -> Path:
    """`path`, or the recipe of this name if there is no such file."""
    return _find(path, RECIPES / f"{path}.yaml") if len(path.parts) == 1 else path


def find_ds_config(path: Path) -> Path:
    """`path`, or the DeepSpeed JSON of this name (`zero3`, `ds_configs/zero3.json`) if there is no such file."""
    if len(path.parts) == 1:
        return _find(path, DS_CONFIGS / f"{path}.json")
    return _find(path, DS_CONFIGS / path.name) if path.parent == Path("ds_configs") else path


def name_of_ds_config(path: Path) -> Path:
    """What `find_ds_config` finds `path` by: its name if it comes with the package, else the path."""
    name = Path(path.stem)
    return name if path.parent == DS_CONFIGS and find_ds_config(name) == path else path


def _find(path: Path, shipped: Path) -> Path:
    return shipped if not path.exists() and shipped.is_file() else path

"""Which fields of a row hold a document: by name, or by a dotted path into objects."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from codeparrot_ds.errors import ConfigError

# Provenance field of a Document -> its names in corpora: ours and CodeParrot's first, then those of other code
# corpora (The Stack: max_stars_*; StarCoder data: repository_name, detected_licenses).
PROVENANCE_FIELDS: dict[str, tuple[str, ...]] = {
    "repository": ("repo_name", "repository", "repo", "max_stars_repo_name", "repository_name"),
    "path": ("path", "file_path", "max_stars_repo_path"),
    "licence": ("license", "licence", "licenses", "max_stars_repo_licenses", "detected_licenses"),
    "source": ("source",),
    "language": ("language", "lang", "programming_language"),
    "commit": ("commit", "max_stars_repo_head_hexsha", "revision_id"),
}
PROVENANCE_NAMES = [name for names in PROVENANCE_FIELDS.values() for name in names]
_LISTED = 20  # names in a message


@dataclass(frozen=True)
class Fields:
    """Fields of a row, each a name or a dotted path ("meta.repo"). A field with exactly this name comes first.

    A field that is named here must be in every row; null means unknown. Provenance that is "" is taken from the usual
    names (`PROVENANCE_FIELDS`) where a row has them.

    Raises ConfigError if provenance is to come from the field of the text.
    """

    text: str = "content"
    repository: str = ""
    path: str = ""
    licence: str = ""
    source: str = ""
    language: str = ""
    commit: str = ""

    def __post_init__(self) -> None:
        for attribute, field in self.named.items():
            if field == self.text:
                raise ConfigError(
                    f"{option(attribute)} {field}: this field holds the text ({option('text')}). Name another one."
                )

    @property
    def named(self) -> dict[str, str]:
        """The fields of the provenance that are named: attribute of a Document -> field."""
        chosen = {attribute: getattr(self, attribute) for attribute in PROVENANCE_FIELDS}
        return {attribute: field for attribute, field in chosen.items() if field}

    @property
    def plain(self) -> bool:
        """Whether no field is a path, and all provenance has a usual name."""
        return "." not in self.text and not self.named

    def usual(self, attribute: str) -> tuple[str, ...]:
        """The usual names of some provenance; none if its field is named. A field is text or provenance, not both."""
        names = () if getattr(self, attribute) else PROVENANCE_FIELDS[attribute]
        return tuple(name for name in names if name != self.text)

    def columns(self, names: Sequence[str]) -> list[str]:
        """The columns among `names` that a document may be made from; of a path that is no column, its first part."""
        wanted = {name for attribute in PROVENANCE_FIELDS for name in self.usual(attribute)}
        wanted |= {field if field in names else field.partition(".")[0] for field in (self.text, *self.named.values())}
        return [name for name in names if name in wanted]

    def missing(self, names: Sequence[str]) -> str | None:
        """Which named field is not a column of a table, as a clause of an error message; None if all are.

        `names` are the columns and, as dotted paths, the fields of those that hold objects.
        """
        for attribute, field in {"text": self.text, **self.named}.items():
            if field not in names:
                return f"no column {field!r} (its columns: {list_names(names)}; select one with {option(attribute)})"
        return None


def option(attribute: str) -> str:
    """The command-line option that names the field of an attribute of a Document."""
    return f"--{attribute}-field"


def look_up(row: Mapping[str, Any], field: str, attribute: str) -> Any:
    """The value of a field of `row`, given by name or dotted path; None if it is null or in an object that is null.

    Raises ValueError with the reason, a clause of an error message, if the row has no such field.
    """
    if field in row:
        return row[field]
    value: Any = row
    parts = field.split(".")
    for depth, part in enumerate(parts):
        if value is None:
            return None
        above = ".".join(parts[:depth])
        if not isinstance(value, Mapping):
            raise ValueError(  # noqa: TRY004 (about the input, like the others)
                f"no field {field!r}, because {above!r} has type {type(value).__name__}, not an object (select another "
                f"with {option(attribute)})"
            )
        if part not in value:
            found = list_names(value)
            whose = f"{above!r} has the fields" if depth else "its fields"
            raise ValueError(f"no field {field!r} ({whose}: {found}; select one with {option(attribute)})")
        value = value[part]
    return value


def list_names(names: Iterable[str]) -> str:
    """Some of the names, for a message."""
    listed = list(names)
    return ", ".join(map(repr, listed[:_LISTED])) + (", ..." if len(listed) > _LISTED else "") or "none"


def as_text(value: Any, field: str) -> str:
    """The value of a named provenance field as text. Raises ValueError for a value that no provenance has."""
    if value is None:
        return ""
    if isinstance(value, list | tuple) and all(isinstance(each, str) for each in value):
        return ", ".join(value)
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"field {field!r} has type {type(value).__name__}, not text")

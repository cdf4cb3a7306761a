"""YAML whose values are read by the type of their key, so that none is taken for something else.

YAML 1.1 decides by a value's looks: `name: 2026-11-24` is a date, `0100` is 64, `1:30` is 90, `on` is true, and `1e-4`
is text. Here every scalar is text until its key says what it is.
"""

import math
import re
import types
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from codeparrot_ds.errors import ConfigError
from codeparrot_ds.system.paths import expand_user, path_of

_NULLS = ("", "~", "null", "Null", "NULL")
_BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_DIGITS = r"[0-9](?:_?[0-9])*"
_NUMBER = re.compile(rf"[+-]?(?:{_DIGITS}(?:\.(?:{_DIGITS})?)?|\.{_DIGITS})(?:[eE][+-]?[0-9]{{1,3}})?")
_MAX_DIGITS = 30  # of an integer: 1e999 is a slip, and takes a kilobyte
_OPENING = ("{", "[", '"', "'")  # an override that is more than text
# In place of pydantic's words.
_PLAIN = {
    "model_type": "must be a section: a mapping of keys to values",
    "dict_type": "must be a mapping",
    "path_type": "must be a path",
    "string_type": "must be text",
    "tuple_type": "must be a list",
}
# What pydantic reports once per member of a union; says nothing where another member has come further.
_OTHER_MEMBER = {"path_type", "dict_type", "string_type", "int_type", "float_type", "bool_type", "tuple_type"}


UserPath = Annotated[Path, AfterValidator(lambda path: expand_user(path_of(path)))]


class Text(str):
    """A scalar of a YAML file or an override. `plain`: not in quotes, so that it may stand for null."""

    plain: bool

    def __new__(cls, text: str, plain: bool = True) -> "Text":
        """See the class."""
        made = super().__new__(cls, text)
        made.plain = plain
        return made

    @property
    def is_null(self) -> bool:
        """Whether it stands for null, where the key can be null."""
        return self.plain and self in _NULLS


class Section(BaseModel):
    """Base class of sections: rejects unknown keys and numbers that are not finite, and is immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _by_type(cls, value: Any, info: Any) -> Any:
        return read_as(cls.model_fields[info.field_name].annotation, value)


def read_as(wanted: Any, value: Any) -> Any:
    """Convert the `Text` in `value`, which may be a list or a mapping, to what a key of type `wanted` holds.

    Raises ValueError when a text is not of that type. Other values are returned unchanged, for pydantic to judge.
    """
    if get_origin(wanted) is Annotated:
        return read_as(get_args(wanted)[0], value)
    members = get_args(wanted) if get_origin(wanted) in (Union, types.UnionType) else (wanted,)
    if isinstance(value, Text):
        return _read_text(members, value)
    for member in members:
        member = get_args(member)[0] if get_origin(member) is Annotated else member
        kinds = get_args(member)
        if isinstance(value, dict) and get_origin(member) is dict:
            return {read_as(kinds[0], key): read_as(kinds[1], each) for key, each in value.items()}
        if isinstance(value, list) and get_origin(member) is tuple and (kinds[-1] is ... or len(kinds) == len(value)):
            each_kind = [kinds[0]] * len(value) if kinds[-1] is ... else kinds
            return [read_as(kind, each) for kind, each in zip(each_kind, value, strict=True)]
    return value


def _read_text(members: Sequence[Any], text: Text) -> Any:
    members = [get_args(member)[0] if get_origin(member) is Annotated else member for member in members]
    if text.is_null and types.NoneType in members:
        return None
    if any(isinstance(member, type) and issubclass(member, BaseModel) for member in members) and text.is_null:
        return {}  # a section without keys
    if text.plain and not text:
        raise PydanticCustomError("empty", "{must}, but has no value", {"must": _must_be(members)})
    if any(get_origin(member) is Literal and text in get_args(member) for member in members):
        return str(text)
    for member in members:
        if member in (str, Path):
            return str(text)
        found = _READERS[member](text.strip()) if member in _READERS else None
        if found is not None:
            return found
    raise PydanticCustomError("unreadable", "{must}", {"must": _must_be(members)})


def _read_bool(text: str) -> bool | None:
    return _BOOLS.get(text.lower())


def _read_int(text: str) -> int | None:
    """An integer, also written like 26e9, 1_000, 0100 (decimal), 0x1F or 0o17; None for other text."""
    if re.fullmatch(r"0x[0-9a-fA-F]+|0o[0-7]+", text) and len(text) < _MAX_DIGITS:
        return int(text, 0)
    if not _NUMBER.fullmatch(text):
        return None
    number = Decimal(text.replace("_", ""))
    return int(number) if number.adjusted() < _MAX_DIGITS and number == number.to_integral_value() else None


def _read_float(text: str) -> float | None:
    found = float(text.replace("_", "")) if _NUMBER.fullmatch(text) else math.nan
    return found if math.isfinite(found) else None


_READERS: dict[Any, Any] = {bool: _read_bool, int: _read_int, float: _read_float}


def _must_be(members: Sequence[Any]) -> str:
    names = []
    for member in members:
        if get_origin(member) is Literal:
            names += [repr(each) for each in get_args(member)]
        elif isinstance(member, type) and issubclass(member, BaseModel):
            names.append("a section: a mapping of keys to values")
        else:
            names.append(_NAMES.get(member) or _NAMES.get(get_origin(member), ""))
    names = list(filter(None, names))
    return "must be " + (f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else "".join(names))


_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    dict: "a mapping",
    tuple: "a list",
    types.NoneType: "null",
}


def parse_yaml(data: bytes, where: str) -> Any:
    """Parse YAML with every scalar as `Text`. Raises ConfigError: not valid, or a key appears twice in a mapping."""
    try:
        return yaml.load(data, _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid YAML ({' '.join(str(error).split())}).") from None


def parse_override(text: str) -> Any:
    """The value of a KEY=VALUE option: a list, a mapping or a quoted text as in YAML, else the text itself.

    Raises yaml.YAMLError.
    """
    return yaml.load(text, _Loader) if text.startswith(_OPENING) else Text(text)


def dump_yaml(body: Any) -> str:
    """The result of `parse_yaml` as YAML, in its order."""
    return yaml.dump(body, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {"<": [("tag:yaml.org,2002:merge", re.compile(r"^(?:<<)$"))]}  # noqa: RUF012 (PyYAML's)

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._checked = set[Any]()

    def flatten_mapping(self, node: Any) -> None:
        """Check the keys, of which PyYAML takes the last of equal ones, and insert those that `<<` names."""
        if node not in self._checked:
            self._checked.add(node)
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if repeated := sorted({key for key in keys if keys.count(key) > 1}):
                raise yaml.constructor.ConstructorError(
                    None, None, f"{', '.join(repeated)} appears twice in one section", node.start_mark
                )
        super().flatten_mapping(node)


def _text(loader: Any, node: Any) -> Text:
    return Text(loader.construct_scalar(node), node.style is None)


for _kind in ("str", "int", "float", "bool", "null", "timestamp"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _text)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's): a plain scalar is text


def _represent(dumper: Any, text: Text) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style=None if text.plain else '"')


_Dumper.add_representer(Text, _represent)


def explain(error: ValidationError, body: Any) -> list[str]:
    """One sentence per invalid key of `body`. A key of a union type fails once per member type; they are joined."""
    found: dict[str, list[tuple[str, str]]] = {}
    for detail in error.errors():
        key = _key(detail["loc"], body, missing=detail["type"] == "missing")
        if detail["type"] == "extra_forbidden":
            reason = "unknown key. Remove it, or correct its spelling."
        elif detail["type"] == "missing":
            reason = "missing."
        elif detail["type"] == "model_type" and not key:
            reason = "must be a mapping of sections"
        else:
            reason = _PLAIN.get(detail["type"]) or detail["msg"].removeprefix("Value error, ")
            reason = re.sub(r"^(?:Input|String|Tuple) should ", "must ", reason)
            if not isinstance(detail["input"], dict) and detail["type"] != "empty":
                shown = str(detail["input"]) if isinstance(detail["input"], Text) else detail["input"]
                reason += f" (got {shown!r})"
        found.setdefault(key, []).append((detail["type"], reason))
    problems = []
    for key, reasons in found.items():
        deeper = any(other.startswith(f"{key}.") for other in found) if key else False
        telling = [reason for kind, reason in reasons if kind not in _OTHER_MEMBER]
        if not telling and deeper:
            continue
        shown = "; or ".join(dict.fromkeys(telling or [reason for _, reason in reasons]))
        problems.append(f"{key}: {shown}" if key else shown)
    return problems


def _key(loc: Sequence[Any], body: Any, missing: bool) -> str:
    """The dotted key of an error: without the member types of unions, which pydantic puts in between."""
    parts = []
    for number, part in enumerate(loc):
        inside = isinstance(body, dict) and part in body
        inside = inside or (isinstance(body, list | tuple) and isinstance(part, int) and part < len(body))
        if inside:
            parts.append(str(part))
            body = body[part]
        elif missing and number == len(loc) - 1:
            parts.append(str(part))
    return ".".join(parts)

"""Datasets of the Hugging Face Hub: their files are read like any other, and what is not in files is streamed."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import msgspec

from codeparrot_ds.documents.document import BadDocument, Read, document_from_table
from codeparrot_ds.documents.fields import Fields
from codeparrot_ds.documents.formats import format_of
from codeparrot_ds.documents.piece import Piece
from codeparrot_ds.errors import DataError

_BUILDERS = {"Json": "jsonl", "Csv": "csv", "Parquet": "parquet"}  # of `datasets` -> kind of the files they read
_HARMLESS = {"name", "version", "data_dir", "data_files", "description", "features"}  # settings of every builder


@dataclasses.dataclass(frozen=True)
class HubDataset:
    """One split of a dataset.

    Attributes:
        files: addresses of its files, if they can be read without `datasets`; else empty.
        stream: the split as a `datasets.IterableDataset`, if it has no such files.
    """

    files: list[str]
    stream: Any = None

    @property
    def parts(self) -> int:
        """Number of parts that can be read separately, usually files."""
        return len(self.files) or int(self.stream.num_shards)


def open_hub_dataset(address: str) -> HubDataset:
    """Open one split: "hub:NAME" or "hub:NAME?split=train&config=C&revision=R".

    NAME is a dataset on the Hub, or a local directory that `datasets` can load. Dataset scripts are never executed.
    Raises DataError.
    """
    from urllib.parse import parse_qsl

    from datasets import load_dataset_builder

    name, _, query = address.removeprefix("hub:").partition("?")
    options = dict(parse_qsl(query))
    unknown = sorted(set(options) - {"split", "config", "revision"})
    if unknown:
        raise DataError(f"{address}: unknown option {unknown[0]!r}; use split, config or revision.")
    split = options.get("split", "train")
    try:
        builder = load_dataset_builder(name, options.get("config"), revision=options.get("revision"))
        if files := _plain_files(builder, split):
            return HubDataset(files)
        return HubDataset([], builder.as_streaming_dataset(split=split))
    except Exception as error:  # datasets raises exceptions of many libraries when a dataset cannot be opened
        raise DataError(
            f"{address}: this dataset cannot be opened ({_one_line(error)}). Check its name, split and "
            "configuration, and the network. A private dataset needs `hf auth login`."
        ) from error


def _plain_files(builder: Any, split: str) -> list[str]:
    """The files of a split if they are in formats of ours and read without settings, else nothing."""
    kind = next((_BUILDERS[each.__name__] for each in type(builder).__mro__ if each.__name__ in _BUILDERS), "")
    files = [str(file) for file in (builder.config.data_files or {}).get(split, [])]
    for field in dataclasses.fields(builder.config):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if field.name not in _HARMLESS and getattr(builder.config, field.name) != default:
            return []
    formats = [format_of(PurePosixPath(file).name) for file in files]
    return files if kind and all(form is not None and form.kind == kind for form in formats) else []


def read_hub(piece: Piece, fields: Fields, read: Callable[[Piece, Fields], Iterator[Read]]) -> Iterator[Read]:
    """Yield the documents of one part of a dataset; `read` reads a file."""
    dataset = open_hub_dataset(piece.address)
    assert piece.stop is not None
    if not dataset.files:
        yield from _read_stream(piece, dataset.stream, fields)
        return
    file = dataset.files[piece.start]
    form = format_of(PurePosixPath(file).name)
    assert form is not None
    number = 1
    for found in read(Piece(file, f"{piece.name}#{PurePosixPath(file).name}", form.kind, 0), fields):
        if isinstance(found, BadDocument):
            where = f"{piece.address} part {piece.start} example {number:,}"
            yield msgspec.structs.replace(found, where=where, reason=f"{found.reason} (in {found.where})")
            number += found.documents
        else:
            yield found
            number += 1


def _read_stream(piece: Piece, dataset: Any, fields: Fields) -> Iterator[Read]:
    """One document per example that `datasets` streams, with the columns of the text and the provenance only."""
    from huggingface_hub.errors import HTTPError

    part = dataset.shard(num_shards=piece.stop, index=piece.start)
    names = part.column_names or []
    if fields.missing([*names, *_nested(part.features or {})]) is None:
        part = part.select_columns(fields.columns(names))
    rows = iter(part)
    for number in itertools.count(1):
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # network errors and damaged files raise exceptions of many libraries
            mend = (
                "Check the network, and run the same command again."
                if isinstance(error, OSError | HTTPError)
                else "Correct the dataset, or download its files and give these as input."
            )
            raise DataError(
                f"{piece.address}: part {piece.start} cannot be read after example {number - 1:,} "
                f"({_one_line(error)}). {mend}"
            ) from error
        where = f"{piece.address} part {piece.start} example {number:,}"
        yield document_from_table(row, fields, where, f"{piece.name}#{piece.start}.{number}")


def _nested(features: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """The dotted paths of all features in columns that hold objects."""
    for name, feature in features.items():
        if above:
            yield f"{above}{name}"
        if isinstance(feature, Mapping):
            yield from _nested(feature, f"{above}{name}.")


def _one_line(error: Exception) -> str:
    """The error, and what caused it if `datasets` hides that."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else None
    texts = [f"{type(each).__name__}: {(str(each).strip() or '?').splitlines()[0]}" for each in (error, cause) if each]
    return "; ".join(texts)

"""Options of `shards build`."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from codeparrot_ds.documents.fields import Fields
from codeparrot_ds.documents.splits import VALID_FRACTION, require_fraction
from codeparrot_ds.errors import ConfigError
from codeparrot_ds.system.jobs import ENGINES, Slice


@dataclass(frozen=True)
class BuildOptions:
    """How documents become shards. The first eight decide what is in the shards, the others how they are built.

    Attributes:
        text_field: field of a row that holds the content, a name or a dotted path into objects.
        provenance: further fields, as the attributes of `documents.fields.Fields`; None for the usual names.
        eos: token that ends each document; None for the tokenizer's own (`tokenizer.directory.end_token`).
        suffix: read files with this suffix in the input directories, one document per file.
        valid_fraction: share of documents that go to the validation split, chosen by a digest of their content; 0 for
            none. None for 0.005, or 0 with `valid_inputs`.
        valid_inputs: input whose documents all go to the validation split. Copies of them in the other input stay in
            the training split.
        shard_tokens: tokens per shard, approximately; None for 1/64 of all tokens, between 4 and 128 million.
        on_bad_document: "fail", or "skip" to skip bad documents and list them in `quarantine.jsonl`.
        encoder: "auto", "fastokens" or "tokenizers".
        workers: local processes; None for one per core.
        engine: "local", or "ray" for a Ray cluster.
        part: the slice of the tasks to run; the last slice to finish writes the manifest. None for all tasks.

    Raises ConfigError for a bad value.
    """

    text_field: str = "content"
    provenance: Mapping[str, str | None] = field(default_factory=dict)
    eos: str | None = None
    suffix: str | None = None
    valid_fraction: float | None = None
    valid_inputs: tuple[str, ...] = ()
    shard_tokens: int | None = None
    on_bad_document: str = "fail"
    encoder: str = "auto"
    workers: int | None = None
    engine: str = "local"
    part: Slice | None = None

    @property
    def fields(self) -> Fields:
        """Fields of a row that hold the content and the provenance. Raises ConfigError."""
        return Fields(self.text_field, **{name: each for name, each in self.provenance.items() if each})

    def __post_init__(self) -> None:
        require_fraction(self.fraction, none=True)
        if self.valid_inputs and self.fraction:
            raise ConfigError(
                f"--valid-fraction {self.fraction} and --valid-input both say what is validated on: omit one of them."
            )
        if self.on_bad_document not in ("fail", "skip"):
            raise ConfigError(f"--on-bad-document {self.on_bad_document}: must be fail or skip.")
        if self.engine not in ENGINES:
            raise ConfigError(f"--engine {self.engine}: must be one of {', '.join(ENGINES)}.")
        if self.engine == "ray" and self.part is not None:
            raise ConfigError("a Ray cluster distributes all tasks by itself: omit --slice, or omit --engine ray.")

    @property
    def fraction(self) -> float:
        """`valid_fraction` or its default."""
        if self.valid_fraction is None:
            return 0.0 if self.valid_inputs else VALID_FRACTION
        return self.valid_fraction

"""The page of a tokenizer: what it is, and how well it fits text, by kind of text and against others."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeparrot_ds.errors import UserError
from codeparrot_ds.report.blocks import Bars, Block, Facts, Figure, Page, Section, Table, Text
from codeparrot_ds.report.units import plain, size
from codeparrot_ds.run.changes import flatten
from codeparrot_ds.system.files import MANIFEST, read_manifest
from codeparrot_ds.system.paths import found_address
from codeparrot_ds.tokenizer.directory import load_tokenizer, tokenizer_digest
from codeparrot_ds.tokenizer.report import Report, report

_MEASURED_BYTES = 100_000_000  # of text without being asked; takes two minutes
_TOKENS = 40  # of each list
_CHARACTERS = 40  # of a token
_DOCUMENTS = 20  # named


@dataclass(frozen=True)
class TokenizerFacts:
    """What is known of a tokenizer.

    Attributes:
        directory: of the tokenizer.
        manifest: of `tokenizer train`; {} for a tokenizer from elsewhere.
        digest: xxh3-128 of tokenizer.json.
        vocab_size: tokens, with added ones.
        measured: on texts; None without texts.
        on_training_text: whether these are the texts that it was trained on.
        missing: why it was not measured.
    """

    directory: Path
    manifest: dict[str, Any]
    digest: str
    vocab_size: int
    measured: Report | None
    on_training_text: bool
    missing: str

    def rows(self) -> list[tuple[str, str]]:
        """The figures as lines of a table."""
        rows = [("vocabulary", f"{self.vocab_size:,} tokens"), ("digest", self.digest)]
        if self.measured is not None:
            rows += [(name, ", ".join(values)) for name, values in self.measured.rows()]
        return [*rows, ("not measured", self.missing)] if self.missing else rows

    def as_json(self) -> dict[str, Any]:
        """Everything that is known."""
        measured = None if self.measured is None else self.measured.as_json()
        return {"vocab_size": self.vocab_size, "digest": self.digest, "manifest": self.manifest, "measured": measured}


def read_tokenizer(directory: Path, texts: Sequence[str] = (), against: Sequence[str] = ()) -> TokenizerFacts:
    """Read a tokenizer, and measure it.

    Args:
        directory: of the tokenizer.
        texts: what to measure it on; default: what it was trained on, if it is still there.
        against: other tokenizers, directories or names on the Hub.

    Raises:
        DataError: the tokenizer, one of the texts or another tokenizer cannot be read.
    """
    manifest = read_manifest(directory, "tokenizer") if (directory / MANIFEST).is_file() else {}
    options = manifest.get("options", {})
    field, suffix, inputs, missing = "content", None, list(texts), ""
    if not texts:
        inputs = [found_address(each, directory) for each in manifest.get("inputs", [])]
        field, suffix = options.get("text_field") or field, options.get("suffix")
        size_of_text = (manifest.get("trained_on") or {}).get("bytes", 0)
        missing = "" if inputs else "no text: name some with --text."
        if size_of_text > _MEASURED_BYTES:
            inputs, missing = [], f"it was trained on {size(size_of_text)} of text: name less with --text."
    measured = None
    if inputs:
        try:
            measured = report(directory, inputs, against, text_field=field, suffix=suffix)
        except (UserError, OSError) as error:
            if texts or against:
                raise
            missing = f"the text that it was trained on cannot be read ({error}) Name some with --text."
    vocab_size = load_tokenizer(directory).get_vocab_size(with_added_tokens=True)
    return TokenizerFacts(directory, manifest, tokenizer_digest(directory), vocab_size, measured, not texts, missing)


def tokenizer_page(facts: TokenizerFacts) -> Page:
    """The page of a tokenizer."""
    return Page(
        title=facts.directory.absolute().name,
        subject="tokenizer",
        summary=_summary(facts),
        figures=_figures(facts),
        sections=(
            Section("Fit", _fit(facts)),
            Section("By kind of text", _kinds(facts.measured)),
            Section("Tokens", _tokens(facts.measured)),
            Section("How it was made", _made(facts)),
            Section("What is not on this page", [Text(facts.missing)] if facts.missing else []),
        ),
    )


def _summary(facts: TokenizerFacts) -> str:
    if facts.measured is None:
        return f"digest {facts.digest}"
    return f"digest {facts.digest}; measured on {facts.measured.documents['read']:,} documents"


def _figures(facts: TokenizerFacts) -> list[Figure]:
    figures = [Figure("vocabulary", f"{facts.vocab_size:,}", "tokens")]
    if facts.measured is not None:
        first = facts.measured.as_json()["tokenizers"][0]
        for name, label, note in (
            ("bytes_per_token", "bytes per token", "of UTF-8"),
            ("characters_per_token", "characters per token", ""),
            ("fertility", "fertility", "tokens per word"),
        ):
            if first[name] is not None:
                figures.append(Figure(label, f"{first[name]:.3f}", note))
        whole = facts.measured.documents["read"]
        figures.append(Figure("round trips", f"{first['round_trip']['equal']:,}", f"of {whole:,} documents"))
        figures.append(Figure("never used", f"{first['unused_tokens']['count']:,}", "tokens of the vocabulary"))
    trained = facts.manifest.get("trained_on")
    if isinstance(trained, dict):
        figures.append(
            Figure("trained on", size(trained.get("bytes", 0)), f"{trained.get('documents', 0):,} documents")
        )
    return figures


def _fit(facts: TokenizerFacts) -> list[Block]:
    measured = facts.measured
    if measured is None:
        return []
    names = measured.labels
    table = Table(["measure", *names], [[name, *values] for name, values in measured.rows()], _numbers(names))
    note = f"Measured on {', '.join(measured.inputs)}."
    if facts.on_training_text:
        note += (
            " This is the text that the tokenizer was trained on, so other text takes more tokens: measure with --text."
        )
    blocks: list[Block] = [table, Text(note)]
    for what, named in (
        ("not divided into kinds of text", measured.not_divided),
        ("not readable", measured.unreadable),
    ):
        if named:
            rows = [[name, reason] for name, reason in list(named.items())[:_DOCUMENTS]]
            caption = f"{len(named):,} documents {what}{f', {_DOCUMENTS} of them' if len(named) > _DOCUMENTS else ''}"
            blocks.append(Table(["document", "reason"], rows, caption=caption, folded=True))
    return blocks


def _numbers(names: Sequence[str]) -> frozenset[int]:
    return frozenset(range(1, len(names) + 1))


def _kinds(measured: Report | None) -> list[Block]:
    if measured is None:
        return []
    first = measured.as_json()["tokenizers"][0]
    counts = [(kind, each["tokens"]) for kind, each in first["by_kind"].items()]
    bars = Bars(f"Tokens of {measured.labels[0]}, by kind of text", ("kind", "tokens"), counts, first["tokens"])
    of_kinds, caption = measured.rows_of_kinds(), "Share, and fit to each kind of text"
    if len(measured.labels) == 1:
        rows = [[kind, *(values[0] for _, values in of_kind)] for kind, of_kind in of_kinds.items()]
        columns = ["kind", *(name for name, _ in next(iter(of_kinds.values())))]
        return [bars, Table(columns, rows, _numbers(columns[1:]), caption)]
    rows = [[f"{kind}, {name}", *values] for kind, of_kind in of_kinds.items() for name, values in of_kind]
    return [bars, Table(["", *measured.labels], rows, _numbers(measured.labels), caption)]


def _tokens(measured: Report | None) -> list[Block]:
    if measured is None:
        return []
    blocks: list[Block] = []
    for label, each in zip(measured.labels, measured.as_json()["tokenizers"], strict=True):
        rows = [
            (name.replace("_", " "), _listed(each[name])) for name in ("first_tokens", "last_tokens", "longest_tokens")
        ]
        rows.append(("never used", _listed(list(each["unused_tokens"]["tokens"].values()))))
        if different := each["round_trip"]["different"]:
            rows.append(("documents that do not round-trip", _listed(different)))
        blocks += [Text(f"Of {label}:"), Facts(rows)] if len(measured.labels) > 1 else [Facts(rows)]
    return blocks


def _listed(tokens: Sequence[str]) -> str:
    cut = (ascii(token[:_CHARACTERS]) + ("…" if len(token) > _CHARACTERS else "") for token in tokens[:_TOKENS])
    more = f" and {len(tokens) - _TOKENS:,} more" if len(tokens) > _TOKENS else ""
    return "  ".join(cut) + more if tokens else "none"


def _made(facts: TokenizerFacts) -> list[Block]:
    manifest = facts.manifest
    if not manifest:
        return [Text("Not made by `codeparrot-ds tokenizer train`: the directory has no manifest.")]
    rows = [("trainer", str(manifest.get("trainer", ""))), ("end token", f"id {manifest.get('eos_id')}")]
    rows.append(("longest sequence", f"{manifest.get('max_seq_len')} tokens"))
    rows.append(("input", ", ".join(map(str, manifest.get("inputs", [])))))
    for name in ("documents", "skipped_files", "options"):
        rows += [
            (f"{name.replace('_', ' ')}: {key}", plain(value))
            for key, value in flatten(manifest.get(name) or {}).items()
            if key
        ]
    return [Facts(rows)]

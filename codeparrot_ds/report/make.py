"""Make a report of one or two directories: figures as rows and JSON, and a page."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codeparrot_ds.errors import ConfigError
from codeparrot_ds.report.blocks import Page
from codeparrot_ds.report.render import render
from codeparrot_ds.report.subject import CORPUS, RUN, TOKENIZER, subject_of
from codeparrot_ds.report.timeline import moment
from codeparrot_ds.run.directory import RunDirectory


@dataclass(frozen=True)
class Options:
    """Options of a report.

    Attributes:
        model, tokenizer, seconds: of one run: a converted model to measure, its tokenizer, and its wall time.
        text, against: of a tokenizer: what to measure it on, and other tokenizers.
    """

    model: Path | None = None
    tokenizer: Path | None = None
    seconds: float | None = None
    text: Sequence[str] = field(default_factory=tuple)
    against: Sequence[str] = field(default_factory=tuple)

    def require_only(self, directories: Sequence[Path], subject: str) -> None:
        """Raise ConfigError if an option is given that would have no effect."""
        of_run, of_tokenizer = ("model", "tokenizer", "seconds"), ("text", "against")
        other = {RUN: of_tokenizer, TOKENIZER: of_run}.get(subject, of_run + of_tokenizer)
        given = [f"--{name}" for name in other if getattr(self, name) not in (None, [], ())]
        if given:
            raise ConfigError(
                f"{', '.join(given)}: no effect on {' and '.join(map(str, directories))} ({subject}). --model, "
                "--tokenizer and --seconds are for one run, --text and --against for a tokenizer. Remove it."
            )


@dataclass(frozen=True)
class Report:
    """A report.

    Attributes:
        rows: name and value of each figure.
        as_json: the figures.
        page: the same and more, to be rendered.
    """

    rows: list[tuple[str, str]]
    as_json: dict[str, Any]
    page: Page

    def html(self) -> str:
        """The page."""
        return render(self.page, moment(time.time()))


def make(directories: Sequence[Path], options: Options) -> Report:
    """Make a report of a run, a corpus, a tokenizer, or two runs.

    Raises:
        ConfigError: a directory is none of these, or an option has no effect.
        DataError: a file in it is damaged.
    """
    subjects = [subject_of(directory) for directory in directories]
    if len(directories) == 2 and subjects == [RUN, RUN]:
        options.require_only(directories, "two runs")
        return _of_two_runs(directories)
    if len(directories) > 1:
        listed = ", ".join(f"{each} (a {subject})" for each, subject in zip(directories, subjects, strict=True))
        raise ConfigError(f"{listed}: only two runs can be shown side by side. Name one directory, or two runs.")
    (directory,), (subject,) = directories, subjects
    options.require_only(directories, subject)
    return {RUN: _of_run, CORPUS: _of_corpus, TOKENIZER: _of_tokenizer}[subject](directory, options)


def _of_run(directory: Path, options: Options) -> Report:
    from codeparrot_ds.report.run_facts import read_run
    from codeparrot_ds.report.run_page import run_page
    from codeparrot_ds.report.summary import as_rows, summarize
    from codeparrot_ds.run.recipe import load_recipe

    run, loss = RunDirectory(directory), None
    facts = read_run(run, options.model, options.tokenizer)
    if options.model is not None:
        from codeparrot_ds.evaluation.loss import validation_loss

        recipe = load_recipe(run.recipe)
        loss = validation_loss(options.model, recipe.data.sources, recipe.evaluation.sequences_afterwards)
    summary = summarize(facts, loss, options.seconds)
    return Report(as_rows(summary), summary.to_dict(), run_page(facts, summary))


def _of_two_runs(directories: Sequence[Path]) -> Report:
    from codeparrot_ds.report.pair_page import pair_page
    from codeparrot_ds.report.run_facts import read_run
    from codeparrot_ds.report.summary import as_rows, summarize

    a, b = (read_run(RunDirectory(directory)) for directory in directories)
    of_a, of_b = summarize(a), summarize(b)
    rows = [(f"{side}: {name}", value) for side, of in (("A", of_a), ("B", of_b)) for name, value in as_rows(of)]
    return Report(rows, {"a": of_a.to_dict(), "b": of_b.to_dict()}, pair_page((a, b), (of_a, of_b)))


def _of_corpus(directory: Path, _: Options) -> Report:
    from codeparrot_ds.report.corpus_page import corpus_page, read_corpus, rows

    manifest, stats, missing = read_corpus(directory)
    as_json = {key: value for key, value in manifest.items() if key not in ("sources", "files")}
    page = corpus_page(directory, manifest, stats, missing)
    return Report(rows(manifest, stats), as_json if stats is None else stats.as_json(), page)


def _of_tokenizer(directory: Path, options: Options) -> Report:
    from codeparrot_ds.report.tokenizer_page import read_tokenizer, tokenizer_page

    facts = read_tokenizer(directory, options.text, options.against)
    return Report(facts.rows(), facts.as_json(), tokenizer_page(facts))

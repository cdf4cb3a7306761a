"""Everything that a run directory, and what its recipe names, tell about a run. What is missing is left out."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from codeparrot_ds.errors import DataError, UserError
from codeparrot_ds.report.compare import read_settings
from codeparrot_ds.report.curves import Curves, read_curves
from codeparrot_ds.report.held_out import HeldOut, read_held_out
from codeparrot_ds.report.status import RunStatus, run_status
from codeparrot_ds.report.timeline import History, read_history
from codeparrot_ds.run.directory import CERTIFICATE, RunDirectory
from codeparrot_ds.run.recipe import Recipe, load_recipe
from codeparrot_ds.shards.format import Manifest
from codeparrot_ds.system.files import read_json
from codeparrot_ds.tokenizer.directory import has_tokenizer

Found = TypeVar("Found")


@dataclass(frozen=True)
class RunFacts:
    """What is known of one run.

    Attributes:
        run: the directory.
        status: state and attempts.
        settings: recipe and DeepSpeed JSON by dotted key, not validated.
        recipe: the recipe, if this version can read it.
        curves: from metrics.jsonl.
        history: attempts and events.
        model, model_step: newest converted model and its step.
        certificate: of that model.
        manifests: of the shards, if all are where the recipe says.
        held_out: validation sequences, if the shards are intact.
        tokenizer: directory of the shards' tokenizer, or its copy in the run.
        missing: what could not be read, and why.
    """

    run: RunDirectory
    status: RunStatus
    settings: dict[str, Any]
    recipe: Recipe | None
    curves: Curves
    history: History
    model: Path | None
    model_step: int | None
    certificate: dict[str, Any] | None
    manifests: list[Manifest] | None
    held_out: HeldOut | None
    tokenizer: Path | None
    missing: list[str]

    @property
    def shards(self) -> list[Path]:
        """Shard directories that the recipe names."""
        return [] if self.recipe is None else list(self.recipe.data.sources)

    @property
    def state(self) -> str:
        """The state in one word: of a killed run "dead", although its status is "running"."""
        return self.status.state.partition(":")[0]

    @property
    def parameters(self) -> int | None:
        """Number of parameters, tied ones counted once."""
        found = self.status.facts.get("parameters") or (self.certificate or {}).get("parameters")
        return found if isinstance(found, int) else None

    @property
    def steps_taken(self) -> int:
        """Optimizer steps that metrics.jsonl has."""
        return int(self.curves.loss.steps[-1]) + 1 if len(self.curves.loss) else 0

    @property
    def last_step(self) -> int | None:
        """The step that the recipe trains to."""
        found = self.settings.get("schedule.steps")
        return found if isinstance(found, int) else None

    @property
    def loss_valid(self) -> float | None:
        """The newest finite validation loss, nats per token."""
        curve = self.curves.get("loss_valid").finite()
        return float(curve.values[-1]) if len(curve) else None


def read_run(run: RunDirectory, model: Path | None = None, tokenizer: Path | None = None) -> RunFacts:
    """Gather what is known of a run, finished or not, on this or another machine.

    Args:
        run: the run directory.
        model: its converted model, if it is not in the run directory.
        tokenizer: its tokenizer, if it is not in the directory of the shards.

    Raises:
        DataError: a file that is there is damaged.
    """
    missing: list[str] = []

    def if_possible(what: str, read: Callable[[], Found]) -> Found | None:
        try:
            return read()
        except (UserError, OSError) as error:
            missing.append(f"{what}: {error}")
            return None

    status = _status(run)
    recipe = if_possible("recipe", lambda: load_recipe(run.recipe))
    shards = {} if recipe is None else dict(recipe.data.sources)
    manifests = if_possible("shards", lambda: [Manifest.read(each) for each in shards]) if shards else None
    held_out = None
    if recipe is not None and manifests:
        evaluation = recipe.evaluation.sequences_afterwards
        held_out = if_possible("validation sequences", lambda: read_held_out(shards, recipe.model.seq_len, evaluation))
    step = None
    if model is None:
        try:
            model, step = run.newest_export()
        except DataError as error:
            missing.append(f"converted model: {error}")
    certificate = None
    if model is not None:
        certificate = if_possible("certificate", lambda: _certificate(model))
    places = [tokenizer] if tokenizer else [*(each / "tokenizer" for each in shards), run.tokenizer]
    return RunFacts(
        run=run,
        status=status,
        settings=read_settings(run),
        recipe=recipe,
        curves=read_curves(run.metrics),
        history=read_history(run, status.in_use),
        model=model,
        model_step=step,
        certificate=certificate,
        manifests=manifests or None,
        held_out=held_out,
        tokenizer=next((each for each in places if has_tokenizer(each)), None),
        missing=missing,
    )


def _status(run: RunDirectory) -> RunStatus:
    """The status; a run whose ranks died before rank 0 wrote one is reported all the same."""
    if run.status_file.exists():
        found = run_status(run)
        found.facts.setdefault("state", "not recorded")
        return found
    try:
        return run_status(run)
    except DataError:
        return RunStatus({"state": "not recorded"}, run.in_use(), [])


def _certificate(model: Path) -> dict[str, Any]:
    body = read_json(model / CERTIFICATE, "certificate")
    if not isinstance(body, dict):
        raise DataError(f"{model / CERTIFICATE}: not a certificate. Convert the checkpoint again.")
    return body

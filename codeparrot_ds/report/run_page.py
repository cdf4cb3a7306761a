"""The page of one run."""

from codeparrot_ds.report.blocks import Block, Chart, Charts, Figure, Page, Section, Series, Text, figures_of
from codeparrot_ds.report.curves import BUCKETS, Curve, Curves, smoothed
from codeparrot_ds.report.run_facts import RunFacts
from codeparrot_ds.report.run_sections import (
    certificate_blocks,
    data_blocks,
    hardware_blocks,
    humaneval_blocks,
    recipe_blocks,
    sample_blocks,
)
from codeparrot_ds.report.summary import Summary
from codeparrot_ds.report.timeline import incidents, time_line
from codeparrot_ds.report.units import duration, large

# Curves below the loss: name in metrics.jsonl, title, unit, style.
SMALL = (
    ("learning_rate", "Learning rate", "", "small"),
    ("gradient_norm", "Gradient norm", "before clipping", "number"),
    ("tokens_per_second", "Throughput", "tokens/s", "number"),
    ("mfu", "MFU", "of the devices' peak", "percent"),
    ("peak_memory_bytes", "Peak memory", "of any rank so far", "bytes"),
    ("data_wait", "Data wait", "of the step's time", "percent"),
)
_NOISY = ("gradient_norm", "tokens_per_second", "mfu", "data_wait")


def run_page(facts: RunFacts, summary: Summary) -> Page:
    """The page of a run, with every section for which something is recorded."""
    certificate = [] if facts.certificate is None else certificate_blocks(facts.certificate)
    notes: list[Block] = []
    if facts.state not in ("finished", "running"):
        last = facts.history.attempts[-1].reason if facts.history.attempts else ""
        reason = facts.status.facts.get("error") or facts.status.facts.get("reason") or last
        notes = [Text(f"{facts.status.state}. {reason}".strip(), warning=True)]
    return Page(
        title=facts.run.path.absolute().name,
        subject="run",
        summary=_summary(facts),
        state=facts.state,
        figures=figures(facts, summary),
        sections=(
            Section("Why it ended", notes),
            Section("Curves", curve_blocks(facts.curves)),
            Section("Time line", [*time_line(facts.history), *incidents(facts.run.incidents)]),
            Section("Samples", sample_blocks(facts.run)),
            Section("HumanEval", humaneval_blocks(facts.run)),
            Section("Data", data_blocks(facts)),
            Section("Conversion certificate", certificate),
            Section("Recipe", recipe_blocks(facts)),
            Section("Hardware and versions", hardware_blocks(facts)),
            Section("What is not on this page", [Text(each) for each in facts.missing]),
        ),
    )


def _summary(facts: RunFacts) -> str:
    settings = facts.settings
    layers, width, length = (settings.get(f"model.{key}") for key in ("n_layer", "n_embd", "seq_len"))
    parts = [
        f"{layers} layers of width {width}, sequences of {length} tokens" if layers else "",
        f"{settings.get('batch.global_batch_size')} sequences per step",
        f"ZeRO-{settings['ds_config.zero_optimization.stage']}"
        if "ds_config.zero_optimization.stage" in settings
        else "",
        str(settings.get("engine.precision", "")),
    ]
    return ", ".join(filter(None, parts))


def figures(facts: RunFacts, summary: Summary) -> list[Figure]:
    """The large numbers of a run; those that are not known are left out."""
    status, found = facts.status.facts, []
    unigram, last = summary.loss_unigram, facts.last_step
    if summary.loss_valid is not None:
        note = "" if unigram is None else f"{unigram:.4f} without context"
        found.append(Figure("validation loss", f"{summary.loss_valid:.4f}", note))
        note = "" if summary.perplexity_unigram is None else f"{summary.perplexity_unigram:,.1f} without context"
        found.append(Figure("perplexity", f"{summary.perplexity_valid:,.1f}", note))
    if summary.bits_per_byte is not None:
        found.append(Figure("bits per byte", f"{summary.bits_per_byte:.4f}", "of validation text"))
    found.append(Figure("steps", f"{facts.steps_taken:,}", "" if last is None else f"of {last:,}"))
    tokens = facts.curves.get("tokens_seen").finite()
    if len(tokens):
        train = sum(manifest.tokens("train") for manifest in facts.manifests or [])
        note = f"{tokens.values[-1] / train:.3g} epochs of {large(train)}" if train else ""
        found.append(Figure("tokens trained on", large(float(tokens.values[-1])), note))
    if facts.parameters:
        found.append(Figure("parameters", large(facts.parameters), f"{facts.parameters:,}"))
    if isinstance(status.get("world_size"), int):
        unit = "GPUs" if status.get("device") == "cuda" else "ranks"
        found.append(
            Figure(
                unit, f"{status['world_size']:,}", str(facts.history.start.get("hardware", status.get("device", "")))
            )
        )
    if summary.seconds is not None:
        found.append(Figure("wall time", duration(summary.seconds), _attempts(facts)))
    if summary.tokens_per_second is not None:
        found.append(Figure("tokens per second", f"{summary.tokens_per_second:,.0f}", "median step"))
    return found


def _attempts(facts: RunFacts) -> str:
    count = len(facts.history.attempts)
    return f"{count:,} attempts" if count > 1 else ""


def curve_blocks(curves: Curves) -> list[Block]:
    """Loss and everything else that is recorded per step."""
    loss, valid = curves.loss, curves.get("loss_valid")
    if not len(loss) and not len(valid):
        return [Text("No step is recorded yet.")]
    series, notes = [], []
    if len(loss):
        smooth, half_life = smoothed(loss)
        series = [Series("training", loss, "faint"), Series("training, smoothed", smooth, "smooth")]
        notes.append(f"Smoothed: exponential moving average with a half-life of {half_life:,.0f} recorded steps.")
    if len(valid):
        series.append(Series("validation", valid, "points"))
    charts = [Chart("Loss", "nats per token", series, wide=True, scales=True)]
    for name, title, unit, style in SMALL:
        curve = derived(curves, name)
        if len(curve.finite()):
            charts.append(Chart(title, unit, lines(title, name, curve), style))
    blocks: list[Block] = [Charts(charts, figures_of(charts))]
    if odd := _non_finite(loss):
        blocks.append(Text(odd, warning=True))
    if len(skipped := curves.skipped):
        listed = ", ".join(f"{step:,}" for step in skipped[:10]) + (", …" if len(skipped) > 10 else "")
        blocks.append(Text(f"{len(skipped):,} skipped steps, because of non-finite gradients: {listed}.", warning=True))
    if curves.repeated:
        notes.append(f"{curves.repeated:,} rows of steps that the run took again are left out.")
    if len(loss) > 1 and len(loss) <= loss.steps[-1] - loss.steps[0]:
        notes.append(f"{len(loss):,} steps of {loss.steps[-1] - loss.steps[0] + 1:,} are recorded.")
    return [*blocks, Text(" ".join(notes))] if notes else blocks


def lines(label: str, name: str, curve: Curve, run: int = 0) -> list[Series]:
    """The line of a curve. Of many points that vary from step to step it would be a band: that one is smoothed too."""
    if name not in _NOISY or len(curve) <= 2 * BUCKETS:
        return [Series(label, curve, run=run)]
    return [Series(label, curve, "faint", run), Series(f"{label}, smoothed", smoothed(curve)[0], "smooth", run)]


def derived(curves: Curves, name: str) -> Curve:
    """A curve in the unit that it is drawn in."""
    if name == "data_wait":
        waited, took = curves.get("data_seconds"), curves.get("step_seconds")
        return Curve(waited.steps, 100 * waited.values / took.values) if len(waited) == len(took) else waited.times(0)
    return curves.get(name).times(100) if name == "mfu" else curves.get(name)


def _non_finite(loss: Curve) -> str:
    odd = loss.steps[~(abs(loss.values) < float("inf"))]
    if not len(odd):
        return ""
    return (
        f"The loss is not finite at {len(odd):,} of {len(loss):,} steps; the first is step {odd[0]:,}. They are gaps."
    )

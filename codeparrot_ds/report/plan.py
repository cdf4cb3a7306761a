"""Text output of a plan."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codeparrot_ds.errors import DataError
from codeparrot_ds.planning.plan import RECOMPUTED, Plan, Prediction, changes, gigabytes
from codeparrot_ds.planning.tune import Trial


def _shards(plan: Plan) -> str:
    """Describe what is known about the recipe's data."""
    from codeparrot_ds.shards.format import Manifest

    once = (
        f"{gigabytes(plan.tokens * plan.token_bytes)} of shards for {plan.tokens / 1e9:,.2f} B tokens, each seen once"
    )
    sources = plan.recipe.data.sources
    try:
        tokens = {directory: Manifest.read(directory).tokens("train") for directory in sources}
    except (DataError, OSError):
        return f"{once} (not built yet)"
    size, whole = gigabytes(sum(tokens.values()) * plan.token_bytes), sum(sources.values())
    epochs = [
        f"{plan.tokens * weight / whole / tokens[directory]:,.2f} epochs of {tokens[directory] / 1e9:,.3f} B tokens"
        for directory, weight in sources.items()
    ]
    return f"{size} of shards: {', '.join(epochs)}"


def as_text(plan: Plan) -> list[str]:
    """Return the lines of the plan as text."""
    return [*_head(plan), *_memory(plan), *_rest(plan), *_table(plan), *_advice(plan)]


def _head(plan: Plan) -> list[str]:
    model, machine, own = plan.recipe.model, plan.machine, plan.own
    cluster, what = machine.cluster, "CPU ranks" if machine.on_cpu else machine.gpu
    hosts = (
        "" if cluster.hosts == 1 else f", {cluster.hosts} hosts, {cluster.host_bytes_per_second * 8 / 1e9:,.0f} Gb/s"
    )
    return [
        f"{plan.recipe.name} on {cluster.gpus} x {what} with {gigabytes(machine.gpu_memory_bytes)} each{hosts}",
        f"  model  {model.parameters / 1e6:,.1f} M parameters: {model.n_layer} blocks of {model.n_embd}, "
        f"{model.vocab_size:,} token ids, sequences of {model.seq_len:,}, {plan.recipe.engine.precision}",
        f"  layout {_layout(own)}, {own.layout.accumulation} micro-batches per step "
        f"({plan.recipe.batch.global_batch_size:,} sequences)",
        "",
    ]


def _memory(plan: Plan) -> list[str]:
    own, memory = plan.own, plan.own.memory
    where = "per rank" if plan.machine.on_cpu else "per GPU"
    parts = sorted(memory.at_peak.items(), key=lambda part: -part[1])
    rows = [(name, gigabytes(memory.between_steps.get(name, 0)), gigabytes(count)) for name, count in parts]
    between = sum(memory.between_steps.values())
    rows.append(("total", gigabytes(between), gigabytes(memory.peak_bytes)))
    lines = [f"memory {where:<17} {'between steps':>13}  {'at the peak, in the ' + memory.peak_at}"]
    lines += [f"  {name:<22} {first:>13}  {second:>12}" for name, first, second in rows]
    if not plan.machine.on_cpu:
        lines += ["", "memory per host"]
        lines += [f"  {name:<22} {gigabytes(count):>13}" for name, count in own.host_bytes.items() if count]
        lines.append(f"  {'total':<22} {gigabytes(sum(own.host_bytes.values())):>13}")
    return [*lines, ""]


def _rest(plan: Plan) -> list[str]:
    machine, own = plan.machine, plan.own
    kept, each = plan.checkpoints_kept, plan.checkpoint_bytes
    lines = [f"disk   {kept} checkpoints of {gigabytes(each)} = {gigabytes(kept * each)}", f"       {_shards(plan)}"]
    if own.nvme_bytes:
        lines.append(f"       {gigabytes(own.nvme_bytes)} offloaded to each host's NVMe")
    if machine.on_cpu:
        return [*lines, ""]
    cluster, (low, high) = machine.cluster, plan.hours(own)
    lines.append(
        f"time   {_seconds(own)} s per step, {_range(low, high)} hours for "
        f"{plan.steps:,} steps of {plan.tokens_per_step:,} tokens, "
        f"{_range(low * cluster.gpus, high * cluster.gpus)} GPU-hours"
    )
    if machine.price_per_hour is not None:
        prices = [machine.price_per_hour * hours * cluster.gpus for hours in (low, high)]
        lines.append(f"cost   {_range(*prices)} at {machine.price_per_hour:g} per GPU-hour")
    lines.append(
        f"       assumes {cluster.gpu_flops / 1e12:,.0f} TFLOP/s at an MFU of {cluster.mfu:g} excluding communication; "
        "range: full to no overlap of communication; evaluations and checkpoints excluded"
    )
    return [*lines, ""]


def _table(plan: Plan) -> list[str]:
    """Return a table of the largest micro-batch that fits, per ZeRO stage and recomputation mode."""
    best: dict[tuple[Path, str], Prediction] = {}
    for each in (plan.own, *plan.others):
        key = (each.choice.deepspeed, each.choice.recompute)
        now = best.get(key)
        if now is None or (each.fits, _size(each)) > (now.fits, _size(now)):
            best[key] = each
    lines = [f"{'largest micro-batch that fits':<40} {'micro-batch':>11}  {'peak':>9}  {'s/step':>13}"]
    for _, each in sorted(best.items(), key=lambda item: (item[0][0].name, RECOMPUTED[item[0][1]])):
        size = f"{each.choice.micro_batch_size}" if each.fits else "none"
        seconds = "" if plan.machine.on_cpu else _seconds(each)
        name = f"{each.choice.deepspeed.stem}, recomputing {each.choice.recompute}"
        lines.append(f"  {name:<38} {size:>11}  {gigabytes(each.memory.peak_bytes):>9}  {seconds:>13}")
    return [*lines, ""]


def _size(each: Prediction) -> int:
    return each.choice.micro_batch_size if each.fits else -each.choice.micro_batch_size


def _advice(plan: Plan) -> list[str]:
    best = plan.advised
    if best is None:
        return []
    if best is plan.own:
        return ["advice keep the recipe: nothing that fits is faster"]
    arguments = " ".join(f"--set {each}" for each in changes(plan.own.choice, best.choice))
    return [f"advice {arguments}", f"       {_why(plan, best)}"]


def _why(plan: Plan, best: Prediction) -> str:
    """Return the reasons to prefer the advised configuration over the recipe's own."""
    own, reasons = plan.own, []
    if best.choice.recompute != own.choice.recompute:
        less = RECOMPUTED[own.choice.recompute] - RECOMPUTED[best.choice.recompute]
        if less > 0:
            reasons.append(f"it computes {less / (3 + RECOMPUTED[own.choice.recompute]):.0%} less")
    if plan.machine.cluster.gpus > 1 and best.time.communication_seconds < 0.99 * own.time.communication_seconds:
        less = 1 - best.time.communication_seconds / own.time.communication_seconds
        reasons.append(f"it spends {less:.0%} less time on communication")
    if best.choice.micro_batch_size > own.choice.micro_batch_size:
        reasons.append("larger micro-batches keep a GPU busier")
    if not own.fits:
        reasons.append("the recipe's own configuration does not fit")
    room = gigabytes(plan.machine.gpu_memory_bytes - best.memory.peak_bytes)
    seconds = "" if plan.machine.on_cpu else f"{_seconds(best)} s per step, "
    facts = f"{seconds}{gigabytes(best.memory.peak_bytes)} ({room} to spare)"
    return f"{facts}: {' and '.join(reasons) or 'it is faster'}"


def _seconds(each: Prediction) -> str:
    if each.offloads:  # the time of transfers to and from the host is not estimated
        return f"over {each.time.overlap_seconds:.3g}"
    return _range(each.time.overlap_seconds, each.time.no_overlap_seconds)


def _layout(each: Prediction) -> str:
    return (
        f"ZeRO-{each.layout.stage} ({each.choice.deepspeed.name}), recomputing {each.choice.recompute}, "
        f"micro-batch {each.choice.micro_batch_size}"
    )


def _range(low: float, high: float) -> str:
    first, second = (f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in (low, high))
    return first if first == second else f"{first} to {second}"


def comparison_text(rows: Sequence[tuple[str, int, int]] | None, measured: dict[str, Any] | None) -> list[str]:
    """Return lines that compare predictions with the measurements of a trial."""
    if rows is None or measured is None:
        return ["", "measured: out of memory"]
    lines = ["", f"{'measured in real steps':<24} {'predicted':>12}  {'measured':>12}"]
    lines += [
        f"  {what:<22} {gigabytes(predicted):>12}  {gigabytes(found):>12}  {predicted / found - 1:+.2%}"
        for what, predicted, found in rows
    ]
    seconds = measured["step_seconds"][1:]
    tokens = measured["tokens_per_step"] * len(seconds) / sum(seconds)
    return [*lines, f"  {tokens:,.0f} tokens/s, {sum(seconds) / len(seconds):.3g} s per step"]


def trial_head() -> str:
    """Return the heading of the trial lines."""
    return f"{'configuration':<46} {'tokens/s':>10}  {'peak, predicted':>15}  {'measured':>10}"


def trial_text(trial: Trial) -> str:
    """Return the line of one trial."""
    choice, peak = trial.prediction.choice, gigabytes(trial.prediction.memory.peak_bytes)
    name = f"{choice.deepspeed.stem}, recomputing {choice.recompute}, micro-batch {choice.micro_batch_size}"
    if trial.result is None:
        return (
            f"{name:<46} {'':>10}  {peak:>15}  {trial.failure.splitlines()[-1] if trial.failure else 'out of memory'}"
        )
    return f"{name:<46} {trial.tokens_per_second:>10,.0f}  {peak:>15}  {gigabytes(trial.result['peak_bytes']):>10}"

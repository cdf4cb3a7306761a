"""Text output of a comparison of two runs."""

from codeparrot_ds.report.compare import Agreement, Comparison, DataAgreement, Side


def as_rows(comparison: Comparison) -> list[tuple[str, str]]:
    """Return (name, value) of each finding, for a table."""
    c = comparison
    rows = [("A", _describe_side(c.a)), ("B", _describe_side(c.b))]
    only = [f"{side.only_here:,} only in {name}" for name, side in (("A", c.a), ("B", c.b)) if side.only_here]
    rows.append(("common steps", "; ".join([f"{c.data.steps:,}, from {c.first_step} to {c.last_step}", *only])))
    rows.append(
        (
            "recipe",
            f"{_count(len(c.recipe), 'key')} differ" if c.recipe else "same, except for name and directories",
        )
    )
    rows += [
        (f"  {key}", " | ".join("-" if value is None else str(value) for value in c.recipe[key])) for key in c.recipe
    ]
    if c.data.first_different is None:
        rows.append(("data", f"same digests at all {c.data.steps:,} common steps"))
    else:
        rows.append(("data", _difference(c.data)))
    rows += _describe("training loss", c.loss, c.tolerance)
    rows += _describe("validation loss", c.loss_valid, c.tolerance)
    rows += _describe("learning rate", c.learning_rate, c.tolerance)
    return [*rows, ("verdict", _verdict(c))]


STEP_COLUMNS = ("step", "data", "loss A", "loss B", "difference")


def step_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """The cells of the step table, one for each of `STEP_COLUMNS`."""
    rows: list[tuple[str, ...]] = []
    for row in comparison.table:
        a, b = (f"{loss:.8f}" if loss is not None else "not finite" for loss in (row.loss_a, row.loss_b))
        difference = "-" if row.difference is None else f"{row.difference:+.1e}" if row.difference else "0"
        rows.append((str(row.step), "same" if row.same_data else "differs", a, b, difference))
    return rows


def as_table(comparison: Comparison) -> list[str]:
    """Return the lines of the step table, with a heading."""
    return [
        f"{step:>8}  {data:<7}  {a:>14}  {b:>14}  {difference:>10}"
        for step, data, a, b, difference in (STEP_COLUMNS, *step_rows(comparison))
    ]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _describe_side(side: Side) -> str:
    facts = [side.run, side.state or "no status", _count(side.steps, "step")]
    if side.world_size is not None:
        facts.insert(2, _count(side.world_size, "rank"))
    if side.taken_again:
        facts.append(f"{_count(side.taken_again, 'row')} of repeated steps ignored")
    return ", ".join(facts)


def _difference(agreement: Agreement | DataAgreement) -> str:
    counts = f"{agreement.different:,} of {agreement.steps:,} steps differ"
    return f"first difference at step {agreement.first_different}; {counts}"


def _describe(name: str, agreement: Agreement, tolerance: float) -> list[tuple[str, str]]:
    if not agreement.steps:
        return [(name, "not recorded at any common step")]
    odd = f"; {_count(agreement.not_finite, 'step')} not finite" if agreement.not_finite else ""
    if agreement.first_different is None:
        return [(name, f"bit-identical at all {agreement.steps:,} common steps{odd}")]
    rows = [(name, f"{_difference(agreement)}{odd}")]
    absolute, relative = agreement.absolute, agreement.relative
    if absolute is not None and relative is not None and absolute.difference:
        largest = f"{absolute.difference:.1e} at step {absolute.step}, relative {relative.difference:.1e}"
        rows.append(("  largest difference", f"{largest} at step {relative.step}"))
    where = "at no step" if agreement.first_beyond is None else f"first at step {agreement.first_beyond}"
    return [*rows, (f"  beyond {tolerance:g}", where)]


def _verdict(comparison: Comparison) -> str:
    data = "different data" if comparison.data.different else "same data"
    beyond = [
        name
        for name, agreement in (("training", comparison.loss), ("validation", comparison.loss_valid))
        if agreement.first_beyond is not None
    ]
    if beyond:
        return f"{data}, {' and '.join(beyond)} losses beyond {comparison.tolerance:g}"
    equal = not comparison.loss.different and not comparison.loss_valid.different
    return f"{data}, {'equal losses' if equal else f'losses within {comparison.tolerance:g}'}"

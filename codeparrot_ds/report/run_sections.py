"""Sections of the page of a run: what its model wrote, its scores, data, certificate, recipe and hardware."""

import contextlib
import json
from typing import Any

import numpy as np

from codeparrot_ds.errors import UserError
from codeparrot_ds.report.blocks import Block, Chart, Charts, Code, Facts, Sample, Series, Table, Text, figures_of
from codeparrot_ds.report.curves import Curve
from codeparrot_ds.report.run_facts import RunFacts
from codeparrot_ds.report.units import plain, size
from codeparrot_ds.run.changes import ENGINE
from codeparrot_ds.run.directory import RunDirectory
from codeparrot_ds.run.events import read_lines
from codeparrot_ds.run.recipe import default_settings
from codeparrot_ds.system.files import read_json

_SAMPLES, _SAMPLED_STEPS = 8, 6  # shown: prompts, and completions of each
_PROMPT_LINES, _PROMPT_CHARACTERS, _COMPLETION_CHARACTERS = 8, 600, 2000


def sample_blocks(run: RunDirectory) -> list[Block]:
    """What the model wrote at evaluations, by prompt."""
    by_number: dict[int, dict[int, tuple[str, str]]] = {}
    for row in read_lines(run.samples):
        number, step = row.get("number"), row.get("step")
        if isinstance(number, int) and isinstance(step, int):
            by_number.setdefault(number, {})[step] = (str(row.get("prompt", "")), str(row.get("completion", "")))
    blocks: list[Block] = []
    for _, by_step in sorted(by_number.items())[:_SAMPLES]:
        steps = sorted(by_step)
        count = min(len(steps), _SAMPLED_STEPS)
        chosen = [steps[i * (len(steps) - 1) // max(count - 1, 1)] for i in range(count)]
        completions = [(f"after step {step:,}", _written(by_step[step][1])) for step in chosen]
        blocks.append(Sample(_end_of(by_step[steps[-1]][0]), completions))
    if by_number:
        steps_of_all = {step for by_step in by_number.values() for step in by_step}
        blocks.append(
            Text(
                "Continued by greedy decoding from the first half of validation sequences: "
                f"{min(len(by_number), _SAMPLES):,} of {len(by_number):,} prompts, at up to {_SAMPLED_STEPS} of "
                f"{len(steps_of_all):,} evaluations. "
                "samples.jsonl in the run directory has all."
            )
        )
    return blocks


def _end_of(prompt: str) -> str:
    lines = prompt.split("\n")
    end = "\n".join(lines[-_PROMPT_LINES:])[-_PROMPT_CHARACTERS:]
    return end if len(end) == len(prompt) else f"[…]\n{end}"


def _written(completion: str) -> str:
    return completion[:_COMPLETION_CHARACTERS].rstrip() or "(white space only)"


def humaneval_blocks(run: RunDirectory) -> list[Block]:
    """Scores of the exports during training, with intervals; what is not readable is left out."""
    found = {}
    for path in sorted((run.path / "humaneval").glob("step-*/results.json")):
        with contextlib.suppress(UserError, KeyError, TypeError, ValueError, AttributeError, StopIteration):
            scores = next(iter(read_json(path, "results of HumanEval")["temperatures"].values()))["scores"]
            estimates = {
                k: tuple(100 * e[name] for name in ("value", "low", "high")) for k, e in scores["pass_at_k"].items()
            }
            passed = sum(each["passed"] > 0 for each in scores["problems"].values())
            found[int(path.parent.name.removeprefix("step-"))] = (estimates, passed, len(scores["problems"]))
    if not found:
        return []
    steps = sorted(found)
    ks = [k for k in found[steps[-1]][0] if all(k in found[step][0] for step in steps)]
    charts, rows = [], []
    for k in ks:
        values = np.array([found[step][0][k][0] for step in steps])
        charts.append(
            Chart(k, "of the problems", [Series(k, Curve(np.array(steps, np.int64), values), "points")], "percent")
        )
    for step in steps:
        estimates, passed, problems = found[step]
        shown = [f"{value:.2f} % ({low:.2f} to {high:.2f})" for value, low, high in (estimates[k] for k in ks)]
        rows.append([f"{step:,}", *shown, f"{passed:,} of {problems:,}"])
    columns = ["step", *ks, "problems passed"]
    table = Table(columns, rows, frozenset(range(len(columns))), "Scores with 95 % confidence intervals")
    return [Charts(charts, figures_of(charts)), table]


def data_blocks(facts: RunFacts) -> list[Block]:
    """The shards that the run was trained on."""
    if facts.manifests is None:
        return [Text(f"The shards are not here: {', '.join(map(str, facts.shards))}.")] if facts.shards else []
    rows = []
    for manifest in facts.manifests:
        documents = sum(shard.documents for shard in manifest.shards)
        rows.append(
            [
                str(manifest.directory),
                f"{documents:,}",
                f"{manifest.tokens('train'):,}",
                f"{manifest.tokens('valid'):,}",
                f"{manifest.vocab_size:,}",
                ", ".join(manifest.inputs),
            ]
        )
    columns = ["shards", "documents", "training tokens", "validation tokens", "vocabulary", "made from"]
    blocks: list[Block] = [Table(columns, rows, frozenset({1, 2, 3, 4}))]
    if held := facts.held_out:
        blocks.append(
            Text(
                f"Validation loss is measured on the same {held.sequences:,} sequences each time: {held.tokens:,} "
                f"tokens, which stand for {held.bytes:,} bytes ({held.bytes / held.tokens:.3g} bytes per token)."
            )
        )
    return blocks


def certificate_blocks(certificate: dict[str, Any]) -> list[Block]:
    """What was verified when the run was converted."""
    forward, engine = (certificate.get(key) for key in ("forward", "engine"))
    sources = certificate.get("source")
    steps = ", ".join(str(each.get("step")) for each in sources) if isinstance(sources, list) else ""
    rows = [
        ("step", steps),
        ("written as", str(certificate.get("dtype", ""))),
        ("parameters", f"{certificate['parameters']:,}" if isinstance(certificate.get("parameters"), int) else ""),
        (
            "tensors verified",
            f"{len(certificate['tensors']):,}" if isinstance(certificate.get("tensors"), dict) else "",
        ),
        ("tied", ", ".join(f"{a} = {b}" for a, b in certificate["tied"].items()) if certificate.get("tied") else ""),
        ("attention scale", str(certificate.get("attention_scale", ""))),
    ]
    if isinstance(engine, dict):
        compared = engine.get("not_compared")
        rows.append(("validation loss in training", str(compared or _number(engine.get("loss_valid"), ".6f"))))
    if isinstance(forward, dict):
        over = f" over {forward.get('sequences')} sequences"
        for name, key, form in (
            ("validation loss of the checkpoint", "loss_master", ".6f"),
            ("validation loss of this model", "loss_written", ".6f"),
            ("validation loss by transformers", "loss_transformers", ".6f"),
            ("largest logit difference", "largest_logit_difference", ".3g"),
            ("largest difference by transformers", "largest_transformers_difference", ".3g"),
        ):
            value = _number(forward.get(key), form)
            rows.append((name, value + (over if value and form == ".6f" else "")))
    versions = certificate.get("versions")
    if isinstance(versions, dict):
        rows.append(("converted with", ", ".join(f"{name} {version}" for name, version in versions.items())))
    if isinstance(certificate.get("peak_memory_bytes"), int):
        rows.append(("peak memory of the conversion", size(certificate["peak_memory_bytes"])))
    files = certificate.get("files")
    table = (
        [Table(["file", "xxh3-128"], [[str(k), str(v)] for k, v in files.items()], caption="Digests", folded=True)]
        if isinstance(files, dict)
        else []
    )
    return [Facts([(name, value) for name, value in rows if value]), *table]


def _number(value: Any, form: str) -> str:
    return f"{value:{form}}" if isinstance(value, int | float) else ""


def recipe_blocks(facts: RunFacts) -> list[Block]:
    """The recipe: keys with another value than the default, all keys, the DeepSpeed JSON."""
    recipe = {key: value for key, value in facts.settings.items() if not key.startswith(ENGINE)}
    defaults = default_settings()
    rows = [[key, plain(value), plain(defaults[key]) if key in defaults else ""] for key, value in recipe.items()]
    changed = [[*row[:2], row[2] or "none: must be set"] for row in rows if row[1] != row[2]]
    engine = {key.removeprefix(ENGINE): value for key, value in facts.settings.items() if key.startswith(ENGINE)}
    blocks: list[Block] = [
        Table(
            ["key", "value", "default"], changed, caption=f"{len(changed)} of {len(rows)} keys differ from the default"
        ),
        Table(["key", "value", "default"], rows, caption="All keys", folded=True),
    ]
    if engine:
        shown = json.dumps(_nested(engine), indent=2)
        blocks.append(Code("DeepSpeed JSON, resolved", shown))
    return blocks


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, last = key.split(".")
        target = nested
        for section in sections:
            target = target.setdefault(section, {})
        target[last] = value
    return nested


def hardware_blocks(facts: RunFacts) -> list[Block]:
    """Hardware and versions of the newest attempt."""
    start, status = facts.history.start, facts.status.facts
    rows = [
        ("hardware", str(start.get("hardware", ""))),
        ("ranks", f"{start.get('world_size', status.get('world_size', ''))}"),
        ("device", str(start.get("device", status.get("device", "")))),
        ("precision", str(start.get("precision", ""))),
    ]
    if facts.status.attempts and isinstance(hosts := facts.status.attempts[-1].get("hosts"), list):
        rows.append(("hosts", ", ".join(map(str, hosts))))
    if isinstance(versions := start.get("versions"), dict):
        rows += [(str(name), str(version)) for name, version in versions.items()]
    return [Facts(rows)] if any(value for _, value in rows) else []

"""Reports: what is read from a directory, few points that show every spike, and a page in which nothing can run."""

import base64
import hashlib
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from codeparrot_ds.cli import app
from codeparrot_ds.errors import ConfigError, DataError
from codeparrot_ds.report.blocks import Charts, Page, Table, TimeLine
from codeparrot_ds.report.curves import BUCKETS, Curve, read_curves, smoothed, thin
from codeparrot_ds.report.make import Options, Report, make
from codeparrot_ds.report.render import UPLOT, render
from codeparrot_ds.report.run_facts import read_run
from codeparrot_ds.report.subject import CORPUS, RUN, TOKENIZER, subject_of
from codeparrot_ds.report.summary import summarize
from codeparrot_ds.report.timeline import read_history
from codeparrot_ds.report.units import duration, large, plain, shown, size
from codeparrot_ds.run.directory import RunDirectory
from codeparrot_ds.run.events import read_lines
from codeparrot_ds.run.recipe import load_recipe
from codeparrot_ds.shards.sequences import Dataset
from codeparrot_ds.tokenizer.encode import Encoder
from codeparrot_ds.training.metrics import Metrics
from tests.conftest import ROOT, recipe_on
from tests.report_runs import BEGAN, HOSTILE, make_eventful_run, make_run, train_row, write_lines

UPLOT_DIGEST = "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"  # of version 1.6.32 on npm
PAGE = ROOT / "codeparrot_ds" / "report" / "page"


def report(*directories: Path, **options: Any) -> Report:
    """Make a report."""
    return make(directories, Options(**options))


def texts_of(page: Page, title: str) -> str:
    """Everything in a section, as Python shows it."""
    return " ".join(str(block) for section in page.sections if section.title == title for block in section.blocks)


# Curves


def test_a_thinned_curve_keeps_every_extreme_at_its_own_step() -> None:
    generator = np.random.default_rng(1)
    values = generator.normal(size=100_000)
    values[[54_321, 77_777]] = 50.0, -50.0
    values[33_333] = np.nan
    steps = np.arange(100_000) * 3
    drawn = thin(Curve(steps, values))
    assert len(drawn) <= 3 * BUCKETS + 2 and np.all(np.diff(drawn.steps) > 0)
    assert np.array_equal(drawn.values, values[drawn.steps // 3], equal_nan=True)  # each is a recorded point
    assert {54_321 * 3, 77_777 * 3, 33_333 * 3, 0, 99_999 * 3} <= set(drawn.steps.tolist())
    for low in range(0, 100_000, 1000):  # longer than a bucket and not aligned with it
        part = drawn.values[(drawn.steps >= 3 * low) & (drawn.steps < 3 * (low + 1000))]
        whole = values[low : low + 1000]
        assert np.nanmax(part) >= np.nanmax(whole[200:-200]) and np.nanmin(part) <= np.nanmin(whole[200:-200])
    assert len(thin(Curve(steps[:1200], values[:1200]))) == 1200


def test_a_smoothed_curve_is_the_weighted_mean_of_all_earlier_values() -> None:
    values = np.random.default_rng(2).normal(5, 1, 300)
    values[[7, 100]] = np.nan
    curve, half_life = smoothed(Curve(np.arange(300), values))
    kept = values[np.isfinite(values)]
    assert half_life == pytest.approx(2.98) and len(curve) == 298
    for i in (0, 1, 50, 297):
        weights = 0.5 ** (np.arange(i, -1, -1) / half_life)
        assert curve.values[i] == pytest.approx((weights * kept[: i + 1]).sum() / weights.sum())


def test_curves_are_read_whatever_a_version_or_a_crash_left(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert not read_curves(metrics).by_name
    metrics.write_text("")
    assert not read_curves(metrics).by_name
    rows = [{"kind": "train", "step": step, "loss": 5.0 - step} for step in range(4)]
    lines = [json.dumps(row) for row in [*rows, {"kind": "valid", "step": 4, "loss_valid": 1.5}, {"kind": "new"}]]
    lines[1] = '{"kind": "train", "step": 1, "loss": NaN}'
    lines[2] = '{"kind": "train", "step": 2, "loss": null, "mfu": null}'
    metrics.write_text("\n".join(lines) + '\n{"kind": "tra')
    found = read_curves(metrics)
    assert set(found.by_name) == {"loss", "loss_valid"}
    assert np.array_equal(found.loss.values, [5.0, np.nan, np.nan, 2.0], equal_nan=True)
    metrics.write_text('{"kind": "train", "step": "x"}\n')
    with pytest.raises(DataError, match="row 1 is not a valid record"):
        read_curves(metrics)


def test_of_steps_that_were_taken_again_the_last_rows_count(tmp_path: Path) -> None:
    again = [train_row(step, loss=1.0, skipped_steps=int(step >= 6)) for step in range(5, 9)]
    rows = [*map(train_row, range(8)), {"kind": "valid", "step": 8, "loss_valid": 9.0}, *again]
    write_lines(tmp_path / "metrics.jsonl", rows)
    found = read_curves(tmp_path / "metrics.jsonl")
    assert found.loss.steps.tolist() == list(range(9)) and found.loss.values[5:].tolist() == [1.0] * 4
    assert found.repeated == 3 and not len(found.get("loss_valid")) and found.skipped.tolist() == [6]


# Time line


def test_the_history_joins_launches_and_events(tmp_path: Path) -> None:
    history = read_history(make_eventful_run(tmp_path / "run"), running=False)
    assert [(each.state, each.steps) for each in history.attempts] == [("failed", (0, 50)), ("finished", (50, 200))]
    assert history.seconds == 165 and history.start["hardware"] == "H100 went wrong"
    what = [(event.what, event.step) for event in history.events]
    assert what == [
        *[("checkpoint", 50), ("skipped steps", 60), ("checkpoint", 100), ("recipe change", 50), ("went back", 100)],
        *[("checkpoint", 150), ("checkpoint", 200)],
    ]
    assert history.events[0].details == "2.5 s until on disk, training waited 0.1 s"


def test_attempts_of_bare_deepspeed_and_one_that_has_not_ended(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    start = {"event": "start", "world_size": 8, "device": "cuda", "step": 0}
    rows = [{"time": BEGAN, **start}, {"time": BEGAN + 9, "event": "end", "state": "failed", "error": "rank 3 hangs"}]
    rows += [{"time": BEGAN + 20, **start}, {"time": BEGAN + 30, "event": "checkpoint", "step": 7}, {"time": None}]
    rows += [{"time": BEGAN + 40, **start, "step": 7}]
    write_lines(run.events, rows)
    with open(run.events, "a", encoding="utf-8") as file:
        file.write('{"time": 17')  # truncated by a crash
    states = [(each.state, each.reason, each.steps) for each in read_history(run, running=True).attempts]
    assert states[:2] == [("failed", "rank 3 hangs", (0, 0)), ("no end recorded", "", (0, 7))]
    assert states[2] == ("running", "", (7, 7))
    assert read_history(run, running=False).attempts[2].state == "no end recorded"


def test_thousands_of_checkpoints_leave_a_bounded_page_that_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_lines(run.events, [{"time": BEGAN + i, "event": "checkpoint", "step": i} for i in range(5000)])
    page = report(run.path).page
    (section,) = [section for section in page.sections if section.title == "Time line"]
    (line,) = [block for block in section.blocks if isinstance(block, TimeLine)]
    assert len(line.marks) == 400 and "400 of 5,000 events" in texts_of(page, "Time line")
    assert "100 of 5,000 are listed" in texts_of(page, "Time line")


def test_samples_of_steps_that_are_repeated_are_dropped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", logging={"tensorboard": False})
    metrics = Metrics(run, load_recipe(run.recipe), 0)
    for step in (0, 3, 6):
        metrics.samples(step, [("def f():", f" # {step}"), ("x =", HOSTILE)])
    metrics.go_back(3, "loss spike")
    metrics.samples(6, [("def f():", " # again")])
    metrics.close()
    rows = [(row["step"], row["number"], row["completion"]) for row in read_lines(run.samples)]
    assert rows == [(0, 0, " # 0"), (0, 1, HOSTILE), (3, 0, " # 3"), (3, 1, HOSTILE), (6, 0, " # again")]
    assert [event.what for event in read_history(run, running=False).events] == ["went back"]
    assert "after step 3" in texts_of(report(run.path).page, "Samples")


# What a directory is


def test_what_a_directory_is_follows_from_its_files(data: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert [subject_of(path) for path in (run.path, data / "corpus", data / "tokenizer")] == [RUN, CORPUS, TOKENIZER]
    (tmp_path / "from-elsewhere").mkdir()
    shutil.copy(data / "tokenizer" / "tokenizer.json", tmp_path / "from-elsewhere")
    assert subject_of(tmp_path / "from-elsewhere") == TOKENIZER
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "certificate.json").write_text("{}")
    for path, reason in (
        (data / "shards", "these are shards"),
        (tmp_path / "hf", "this is a converted model"),
        (tmp_path, "not a directory that a page"),
        (tmp_path / "absent", "no such directory"),
    ):
        with pytest.raises(ConfigError, match=reason) as caught:
            subject_of(path)
        assert all(word in str(caught.value) for word in ("a run", "a corpus", "a tokenizer", "two runs"))


@pytest.mark.parametrize(
    ("names", "options", "reason"),
    [
        (("run",), {"against": ["gpt2"]}, "--against: no effect"),
        (("run", "run"), {"seconds": 1.0}, "--seconds: no effect"),
        (("tokenizer",), {"model": Path("m")}, "--model: no effect"),
        (("corpus",), {"text": ["x"]}, "--text: no effect"),
        (("run", "corpus"), {}, "only two runs"),
        (("run", "run", "run"), {}, "only two runs"),
    ],
)
def test_an_option_without_effect_is_refused(
    data: Path, tmp_path: Path, names: tuple[str, ...], options: dict[str, Any], reason: str
) -> None:
    run = make_run(tmp_path / "run").path
    with pytest.raises(ConfigError, match=reason):
        report(*(run if name == "run" else data / name for name in names), **options)


# Figures


def test_bits_per_byte_are_those_of_the_validation_sequences(data: Path, tmp_path: Path) -> None:
    recipe = recipe_on(data, tmp_path)
    run = make_run(tmp_path / "tiny", 6, **{key: recipe[key] for key in ("model", "data", "evaluation", "schedule")})
    summary = summarize(read_run(run))
    loaded = load_recipe(run.recipe)
    valid = Dataset.open(loaded.data.sources, 32).valid
    ids = valid.batch(np.arange(7) * len(valid) // 7)[:, 1:]
    encoder = Encoder(data / "tokenizer")
    texts = [encoder.decode(row[row != encoder.eos_id]) for row in ids]
    assert not any("\ufffd" in text for text in texts)  # no sequence cuts a character
    loss = 2.2 + 7 * math.exp(-6 / 80)
    assert summary.loss_valid == pytest.approx(loss)
    count = sum(len(text.encode()) for text in texts)
    assert summary.bits_per_byte == pytest.approx(loss * ids.size / math.log(2) / count)
    shares = np.unique(ids, return_counts=True)[1] / ids.size
    assert summary.loss_unigram == pytest.approx(-(shares * np.log(shares)).sum())
    assert summary.state == "finished" and summary.tokens is not None
    assert set(summary.paths) == {"corpus", "tokenizer", "shards", "run"}


def test_a_run_is_reported_in_any_state_and_without_anything_else(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 10)
    run.write_status("running", world_size=2)
    assert summarize(read_run(run)).state == "dead"  # no process holds its lock
    run.write_status("failed", error="TrainingError: too many skipped steps")
    found = report(run.path)
    assert found.page.state == "failed" and "too many skipped steps" in texts_of(found.page, "Why it ended")
    assert ("state", "failed, 10 steps taken") in found.rows and found.as_json["loss_valid"] is not None
    for path in (run.ds_config, run.status_file, run.events, run.metrics):
        path.unlink()
    (run.path / "launches.jsonl").touch()
    run.recipe.write_text(yaml.safe_dump({"batch": {"global_batch_size": 4}, "of_another_version": {"x": 1}}))
    found = report(run.path)  # this version cannot validate the recipe, and nothing was recorded
    assert found.page.state == "not recorded"
    assert "No step is recorded yet" in texts_of(found.page, "Curves")
    assert "of_another_version" in texts_of(found.page, "Recipe")
    assert "of_another_version" in texts_of(found.page, "What is not on this page")
    render(found.page, "now")


def test_a_page_has_every_section_of_what_a_run_recorded(tmp_path: Path) -> None:
    page = report(make_eventful_run(tmp_path / "run").path).page
    titles = [section.title for section in page.sections if section.blocks]
    assert titles == [
        *("Why it ended", "Curves", "Time line", "Samples", "HumanEval", "Data", "Conversion certificate", "Recipe"),
        *("Hardware and versions", "What is not on this page"),
    ]
    (charts,) = [b for s in page.sections if s.title == "Curves" for b in s.blocks if isinstance(b, Charts)]
    assert [chart.title for chart in charts.charts] == [
        *("Loss", "Learning rate", "Gradient norm", "Throughput", "MFU", "Peak memory", "Data wait")
    ]
    (row,) = [row for row in charts.figures.rows if row[0].startswith("Loss: training")]
    assert row[4] == "30 at 120"  # the spike, in the table too
    assert "2 of 200 steps; the first is step 60" in texts_of(page, "Curves")
    assert "2 skipped steps, because of non-finite gradients: 60, 61." in texts_of(page, "Curves")
    assert "12.50 % (6.25 to 25.00)" in texts_of(page, "HumanEval") and "1 of 2" in texts_of(page, "HumanEval")
    assert "after step 100" in texts_of(page, "Samples") and "2.250000" in texts_of(page, "Conversion certificate")
    (changed, *_) = [b for s in page.sections if s.title == "Recipe" for b in s.blocks if isinstance(b, Table)]
    settings = {row[0]: row[1:] for row in changed.rows}
    assert settings["engine.precision"] == ["fp32", "bf16"] and "seed" not in settings
    assert settings["optimizer.learning_rate"] == ["0.001", "none: must be set"]


def test_two_runs_are_compared_or_it_says_why_not(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", optimizer={"learning_rate": 2e-3})
    page = report(a.path, b.path).page
    assert "same data, equal losses" in texts_of(page, "Step by step")
    assert "['optimizer.learning_rate', '0.001', '0.002']" in texts_of(page, "Recipes")
    other = make_run(tmp_path / "other", batch={"global_batch_size": 4})
    page = report(a.path, other.path).page
    assert "their steps do not correspond" in texts_of(page, "Step by step")
    (charts,) = [b for s in page.sections if s.title == "Curves" for b in s.blocks if isinstance(b, Charts)]
    assert [series.label for series in charts.charts[0].series if series.role == "smooth"] == [
        "A, smoothed",
        "B, smoothed",
    ]


def test_a_corpus_and_a_tokenizer_have_pages(data: Path, tmp_path: Path) -> None:
    page = report(data / "corpus").page
    manifest = json.loads((data / "corpus" / "manifest.json").read_text())
    assert page.figures[0].value == f"{manifest['documents']:,}"
    assert "def " in texts_of(page, "Examples")
    text = tmp_path / "text.jsonl"
    write_lines(text, [{"content": f"def f{i}(x):\n    return x + {i}\n", "path": f"{i}.py"} for i in range(5)])
    tokenizer = shutil.copytree(data / "tokenizer", tmp_path / "tokenizer")
    made = json.loads((tokenizer / "manifest.json").read_text()) | {"inputs": ["../text.jsonl"]}
    (tokenizer / "manifest.json").write_text(json.dumps(made))
    found = report(tokenizer)
    assert found.as_json["measured"]["tokenizers"][0]["round_trip"]["equal"] == 5
    assert "This is the text that the tokenizer was trained on" in texts_of(found.page, "Fit")
    assert "indentation" in texts_of(found.page, "By kind of text")
    held_out = report(tokenizer, text=[str(text)], against=[str(data / "tokenizer")])
    assert "trained on" not in texts_of(held_out.page, "Fit")
    assert len(held_out.as_json["measured"]["tokenizers"]) == 2
    text.unlink()
    assert "Name some with --text." in texts_of(report(tokenizer).page, "What is not on this page")


def test_what_cleaning_removed_is_shown_by_step(tmp_path: Path) -> None:
    """A cleaned corpus without the list of what was removed still has a page."""
    manifest = {
        "format_version": 1,
        "kind": "corpus",
        "read": 10,
        "documents": 4,
        "text_bytes": 400,
        "removed": {"generated": 5, "exact duplicate": 1},
        "options": {"cleaning": {"x": 1}},
        "kept_by": {"licences": {"": 1, **{f"licence {i:02}": 3 for i in range(20)}}},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    page = report(tmp_path).page
    assert "('generated', 5), ('exact duplicate', 1)" in texts_of(page, "What was removed")
    assert "6 others: 16 documents" in texts_of(page, "Licences")
    assert "was not made by" in texts_of(page, "What is not on this page")


def test_figures_have_units() -> None:
    assert [shown(value, style) for value, style in ((41.234, "percent"), (8.56e8, "bytes"), (1.5e-5, "small"))] == [
        *("41.23 %", "856 MB", "1.5e-05")
    ]
    assert [size(value) for value in (0, 999, 1000, 2.5e12)] == ["0 B", "999 B", "1 kB", "2.5 TB"]
    assert [large(value) for value in (999, 3_401_856, 1.5e9)] == ["999", "3.4 M", "1.5 G"]
    assert [duration(value) for value in (0.125, 59.6, 60, 7500, 200_000)] == [
        *("0.1 s", "1 min 00 s", "1 min 00 s", "2 h 05 min", "2 d 07 h")
    ]
    assert [plain(value) for value in (None, True, [1, "a"], 1e-3, "text")] == [
        "null",
        "true",
        '[1, "a"]',
        "0.001",
        "text",
    ]


# The page


class Elements(HTMLParser):
    """Tags with their attributes, and the text of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """See HTMLParser."""
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        """See HTMLParser."""
        if self.tags and self.tags[-1][0] in ("script", "style") and data.strip():
            self.raw.append((self.tags[-1][0], data))


def test_hostile_text_adds_no_element_and_nothing_is_loaded(tmp_path: Path) -> None:
    pages = [Elements(report(make_eventful_run(tmp_path / name, text).path).html()) for name, text in NAMED_TEXTS]
    plain, hostile = pages
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in plain.tags]
    for tag, attributes in hostile.tags:
        assert not {
            name for name in attributes if name.startswith("on") or name in ("src", "style", "srcset", "action")
        }
        assert tag != "link" or attributes == {"rel": "icon", "href": "data:,"}
        assert tag != "a" or str(attributes["href"]).startswith("#")
    html = report(tmp_path / "hostile").html()
    assert (
        HOSTILE not in html
        and "\u202e" not in html
        and "\\u202e" in html
        and "49" not in re.findall(r"\{\{.*?\}\}", html)
    )


NAMED_TEXTS = (("plain", "went wrong"), ("hostile", HOSTILE))


def test_only_the_scripts_and_styles_of_this_package_may_run(tmp_path: Path) -> None:
    found = Elements(report(make_run(tmp_path / "run").path).html())
    (policy,) = [a["content"] or "" for tag, a in found.tags if a.get("http-equiv") == "Content-Security-Policy"]
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy.split("; ")}
    digests = [(tag, base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()) for tag, text in found.raw]
    (style,), (_, *scripts) = ([d for tag, d in digests if tag == wanted] for wanted in ("style", "script"))
    assert rules["style-src"] == [f"'sha256-{style}'"]
    assert rules["script-src"] == [f"'sha256-{digest}'" for digest in scripts] and len(scripts) == 2
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == ["'none'"]


def test_what_is_drawn_is_json_without_nan(tmp_path: Path) -> None:
    run = make_eventful_run(tmp_path / "run")
    found = Elements(report(run.path).html())
    drawn = json.loads(next(text for tag, text in found.raw if tag == "script"), parse_constant=pytest.fail)
    loss = next(series for series in drawn[0]["series"] if series["role"] == "faint")
    assert loss["x"] == list(range(200)) and [i for i, y in enumerate(loss["y"]) if y is None] == [60, 61]
    assert loss["y"][120] == 30.0


def test_the_page_of_a_long_run_is_bounded(tmp_path: Path) -> None:
    sizes = [len(report(make_run(tmp_path / f"{steps}", steps).path).html()) for steps in (2_000, 6_000)]
    assert sizes[1] < 1.1 * sizes[0] < 400_000


def test_a_report_writes_nothing_but_its_output(tmp_path: Path) -> None:
    run = make_eventful_run(tmp_path / "run")
    moved = tmp_path / "elsewhere" / "copy"
    shutil.copytree(run.path, moved)
    shutil.rmtree(run.path)
    before = {path: path.stat().st_mtime_ns for path in [moved, *moved.rglob("*")]}
    done = CliRunner().invoke(
        app, ["report", str(moved), "-o", str(tmp_path / "page.html"), "--summary", f"{tmp_path}/s"]
    )
    assert done.exit_code == 0, done.output
    assert {path: path.stat().st_mtime_ns for path in [moved, *moved.rglob("*")]} == before
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert json.loads((tmp_path / "s").read_text())["state"] == "failed"
    assert json.loads(CliRunner().invoke(app, ["report", str(moved), "--json"]).output)["step"] == 200


def test_a_page_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run").path
    for output, reason in (
        (tmp_path, "is a directory"),
        (run / "recipe.yaml" / "x", "is a file"),
        ("/proc/x", "write"),
    ):
        for option in ("-o", "--summary"):
            done = CliRunner().invoke(app, ["report", str(run), option, str(output)])
            assert isinstance(done.exception, ConfigError) and reason in str(done.exception)
    done = CliRunner().invoke(app, ["report", str(run), "-o", str(tmp_path / "new" / "page.html")])
    assert done.exit_code == 0 and (tmp_path / "new" / "page.html").is_file()


def luminance(color: str) -> float:
    """Relative luminance of #rrggbb. Source: WCAG 2.2."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_and_lines_have_the_contrast_of_wcag_aa(scheme: int) -> None:
    blocks = re.findall(r":root(?::not\(\.light\))? \{(.*?)\}", (PAGE / "page.css").read_text(), re.DOTALL)
    colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[scheme]))
    for paper in ("paper", "raised"):
        for name in ("ink", "muted", "one", "two", "valid", "good", "bad", "wait", "calm"):
            light, dark = sorted((luminance(colors[name]), luminance(colors[paper])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{name} on {paper}"


def test_the_plotting_library_is_unchanged_and_has_its_licence() -> None:
    assert f"(v{UPLOT})" in (PAGE / "uPlot" / "uPlot.iife.min.js").read_text()[:100]
    assert hashlib.sha256((PAGE / "uPlot" / "uPlot.iife.min.js").read_bytes()).hexdigest() == UPLOT_DIGEST
    assert "Permission is hereby granted" in (PAGE / "uPlot" / "LICENSE").read_text()
    assert f"uPlot](https://github.com/leeoniya/uPlot) {UPLOT}" in (ROOT / "docs" / "report.md").read_text()

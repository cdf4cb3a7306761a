"""Shared fixtures: a small real corpus with its tokenizer and shards, and jobs of real ranks on CPU cores."""

import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from codeparrot_ds.corpus.collect import collect
from codeparrot_ds.run.directory import RunDirectory
from codeparrot_ds.run.ds_config import checkpoint_bytes
from codeparrot_ds.shards.build import build
from codeparrot_ds.shards.options import BuildOptions
from codeparrot_ds.tokenizer.train import train as train_tokenizer
from tests.forked_ranks import ForkServer

ROOT = Path(__file__).resolve().parent.parent
VOCAB_SIZE = 512
SEQ_LEN = 32
OPERATORS_TIMEOUT = 1200  # seconds; takes two minutes on two idle cores, and waiting workers need the same limit
LAUNCH_TIMEOUT = 300  # seconds; a hung rendezvous would wait for more than ten minutes

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark nightly tests as slow too, so that -m "not slow" skips them."""
    for item in items:
        if item.get_closest_marker("nightly"):
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI a skipped test fails: all dependencies are installed there, so a skip would hide a lost test."""
    report = yield
    if report.skipped and os.environ.get("CI") == "true":
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI does not allow: {report.longrepr}"
    return report


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Directory `name` of this session, filled by `make(directory)` in one worker and shared by all workers."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    directory, finished = root / name, root / f"{name}.finished"
    with FileLock(root / f"{name}.lock"):
        if not finished.exists():
            shutil.rmtree(directory, ignore_errors=True)  # left by a worker that failed
            directory.mkdir()
            make(directory)
            finished.touch()
    return directory


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with `corpus`, `tokenizer` and `shards` of two standard-library packages."""

    def make(root: Path) -> None:
        standard_library = Path(sysconfig.get_path("stdlib"))
        collect(root / "corpus", [standard_library / "asyncio", standard_library / "email"])
        train_tokenizer(root / "corpus", root / "tokenizer", VOCAB_SIZE, SEQ_LEN)
        build(root / "corpus", root / "tokenizer", root / "shards", BuildOptions(valid_fraction=0.1, workers=1))

    return once(tmp_path_factory, "data", make)


@pytest.fixture
def tiny_recipe(tmp_path: Path, data: Path) -> dict[str, Any]:
    """A recipe of about 50,000 parameters on `data`, writing below `tmp_path`; tests modify it before saving it."""
    return recipe_on(data, tmp_path / "runs")


def recipe_on(data: Path, runs: Path) -> dict[str, Any]:
    """Build the body of `tiny_recipe`."""
    return {
        "name": "tiny",
        "runs": str(runs),
        "model": {
            "vocab_size": VOCAB_SIZE,
            "seq_len": SEQ_LEN,
            "n_layer": 2,
            "n_head": 2,
            "n_embd": 32,
            "activation_checkpointing": "full",
        },
        "data": {"shards": str(data / "shards")},
        "batch": {"global_batch_size": 4},
        "optimizer": {"learning_rate": 0.01},
        "schedule": {"steps": 6, "warmup_steps": 1},
        "engine": {"deepspeed": str(ROOT / "ds_configs" / "zero3.json"), "precision": "fp32"},
        "evaluation": {"every_steps": 3, "sequences": 7},
        "checkpoints": {"every_steps": 3, "keep_last": 2},
        "logging": {"every_steps": 2, "tensorboard": False},
    }


def save_recipe(body: dict[str, Any], path: Path) -> Path:
    """Write a recipe as YAML and return its path."""
    path.write_text(yaml.safe_dump(body), encoding="utf-8")
    return path


@dataclass
class Launched:
    """A finished job."""

    returncode: int
    output: str  # stdout and stderr of the launcher and all ranks, combined


def set_options(overrides: Sequence[str]) -> list[str]:
    """The `--set` options for `overrides`; of those with one key, the last, because a key may be set only once."""
    last = {override.partition("=")[0]: override for override in overrides}
    return [part for override in last.values() for part in ("--set", override)]


RunRanks = Callable[..., Launched]  # type of `deepspeed` and `forked`
DeepspeedCommand = Callable[..., tuple[list[str], dict[str, str]]]


@pytest.fixture(scope="session")
def rank_environment(pytestconfig: pytest.Config) -> dict[str, str]:
    """Environment of ranks on CPU cores. All share one directory of compiled operators, which is kept."""
    versions = "-".join(f"{name}{importlib.metadata.version(name)}" for name in ("torch", "deepspeed"))
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR") or str(pytestconfig.cache.mkdir(f"operators-{versions}"))
    return {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": extensions,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{ROOT / 'tests' / 'tools'}:{os.environ['PATH']}",
    }


@pytest.fixture(scope="session")
def operators(rank_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compile DeepSpeed's cpu_adam and async_io in parallel if needed; this takes longer than a job may."""

    def compile_all(directory: Path) -> None:
        code = "from deepspeed.ops import op_builder; op_builder.{}().load(verbose=False)"
        # At a lower priority than other tests, some of which wait for a niced process. Each compiler takes 1.5 GB.
        builds = [
            subprocess.Popen(
                ["nice", "-n", "5", sys.executable, "-c", code.format(builder)],
                env={**rank_environment, "MAX_JOBS": "2"},
            )
            for builder in ("CPUAdamBuilder", "AsyncIOBuilder")
        ]
        assert [each.wait(OPERATORS_TIMEOUT) for each in builds] == [0, 0]

    once(tmp_path_factory, "operators", compile_all)


@pytest.fixture(scope="session")
def fork_server(rank_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Server that forks ranks quickly (see forked_ranks.py)."""
    with ForkServer(tmp_path_factory.mktemp("forked"), rank_environment) as server:
        yield server


@pytest.fixture(scope="session")
def forked(fork_server: ForkServer) -> RunRanks:
    """Run ranks to completion without a launcher: `forked("--module", "codeparrot_ds.train", recipe, ranks=2)`."""

    def run(*arguments: str | Path, ranks: int = 2, cwd: Path = ROOT, env: dict[str, str] | None = None) -> Launched:
        job = fork_server.start(*arguments, ranks=ranks, cwd=cwd, env=env)
        try:
            code = job.poll(LAUNCH_TIMEOUT)
        finally:
            job.end()
        assert code is not None, f"not done after {LAUNCH_TIMEOUT} s. Its output:\n{job.log.read_text()}"
        return Launched(code, job.log.read_text())

    return run


@pytest.fixture(scope="session")
def deepspeed_command(rank_environment: dict[str, str]) -> DeepspeedCommand:
    """Command and environment for `deepspeed --num_gpus N ...` on CPU ranks."""

    def build(
        *arguments: str | Path, ranks: int = 2, options: Sequence[str] = (), env: dict[str, str] | None = None
    ) -> tuple[list[str], dict[str, str]]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        program = shutil.which("deepspeed", path=str(Path(sys.executable).parent)) or "deepspeed"
        command = [program, "--quiet", *options, "--master_port", port]
        if "--hostfile" not in options:
            command += ["--num_gpus", str(ranks)]
        command += [str(argument) for argument in arguments]
        return command, {**rank_environment, **(env or {})}

    return build


@pytest.fixture(scope="session")
def deepspeed(deepspeed_command: DeepspeedCommand) -> RunRanks:
    """Run `deepspeed --num_gpus N ...` on CPU ranks to completion."""

    def run(*arguments: str | Path, cwd: Path = ROOT, **how: Any) -> Launched:
        command, environment = deepspeed_command(*arguments, **how)
        done = subprocess.run(
            command,
            env=environment,
            cwd=cwd,
            timeout=LAUNCH_TIMEOUT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return Launched(done.returncode, done.stdout)

    return run


@dataclass
class Trained:
    """A finished training run."""

    run: RunDirectory
    rows: list[dict[str, Any]]

    def losses(self) -> list[str]:
        """Training loss of each step as an exact hex float."""
        return [row["loss"].hex() for row in self.rows if row["kind"] == "train"]

    def valid_losses(self) -> dict[int, float]:
        """Validation loss by step."""
        return {row["step"]: row["loss_valid"] for row in self.rows if row["kind"] == "valid"}

    def digests(self) -> list[str]:
        """Digest of the ids fed at each step."""
        return [row["batch_digest"] for row in self.rows if row["kind"] == "train"]

    def require_checkpoint_as_large_as_estimated(self, stage: int, precision: str = "fp32") -> None:
        """Check the size of the checkpoint, up to names and shapes, which take less than a byte per parameter."""
        newest = self.run.newest_checkpoint()
        size = sum(file["bytes"] for file in newest.files.values())
        more = size - sum(checkpoint_bytes(newest.parameters, stage, precision))
        assert 0 < more < 42_000, f"stage {stage}, {precision}: {more / newest.parameters:.2f} bytes per parameter"


def train(
    run_ranks: RunRanks,
    body: dict[str, Any],
    *,
    ranks: int = 2,
    stage: int = 3,
    options: Sequence[str] = (),
    env: dict[str, str] | None = None,
) -> Trained:
    """Train a recipe with `forked` or `deepspeed` and read its results."""
    ds_config = ROOT / "ds_configs" / f"zero{stage}.json"
    body = {**body, "engine": {**body["engine"], "deepspeed": str(ds_config)}}
    runs = Path(body["runs"])
    runs.mkdir(exist_ok=True)
    path = save_recipe(body, runs / f"{body['name']}.yaml")
    overrides = set_options(options)
    done = run_ranks("--module", "codeparrot_ds.train", path, *overrides, ranks=ranks, env=env)
    assert done.returncode == 0, done.output
    return read_run(runs / body["name"])


def read_run(path: Path) -> Trained:
    """Read a run directory's metrics."""
    run = RunDirectory(path)
    return Trained(run, [json.loads(line) for line in run.metrics.read_text().splitlines()])


@pytest.fixture
def train_tiny(forked: RunRanks, tiny_recipe: dict[str, Any]) -> Callable[..., Trained]:
    """Train the tiny recipe below `tmp_path`: `train_tiny(name, ranks=2, stage=3, options=["key=value"])`."""

    def run(name: str, **how: Any) -> Trained:
        return train(forked, {**tiny_recipe, "name": name}, **how)

    return run


@pytest.fixture(scope="session")
def baseline(forked: RunRanks, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The tiny recipe trained on ZeRO-3 and two ranks, once for all tests; read-only."""
    runs = once(tmp_path_factory, "baseline", lambda runs: train(forked, {**recipe_on(data, runs), "name": "baseline"}))
    return read_run(runs / "baseline")


@pytest.fixture
def copy_baseline(baseline: Trained, tiny_recipe: dict[str, Any]) -> Callable[[str], Trained]:
    """A copy of `baseline` under another name below `tmp_path`, to modify or to resume from."""

    def copy(name: str) -> Trained:
        return read_run(shutil.copytree(baseline.run.path, Path(tiny_recipe["runs"]) / name))

    return copy

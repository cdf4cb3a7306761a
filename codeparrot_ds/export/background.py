"""Convert, push and score a run's checkpoints while it trains, in separate processes, one checkpoint at a time."""

import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

from codeparrot_ds.export.certificate import CERTIFICATE
from codeparrot_ds.run.directory import RunDirectory
from codeparrot_ds.run.recipe import Recipe
from codeparrot_ds.system.files import read_json
from codeparrot_ds.system.launched import without_launcher

log = logging.getLogger("codeparrot_ds")
# It exits with the thread that started it, and yields the CPU to training.
_COMMAND = """
import os
from codeparrot_ds.system.jobs import die_with_parent
os.nice(10)
die_with_parent()
from codeparrot_ds.cli import main
main()
"""


class BackgroundExport:
    """Background exports of one run, started by its rank 0. Failures are logged and never stop training."""

    def __init__(self, run: RunDirectory, recipe: Recipe) -> None:
        """Set up exports of `run`. On the Hub, the branch has the name of the recipe."""
        self._run, self._settings, self._branch = run, recipe.export, recipe.name
        self._humaneval, self._tensorboard = recipe.evaluation.humaneval, recipe.logging.tensorboard
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[str] | None = None
        self._given_up = threading.Event()

    def start(self, step: int) -> None:
        """Start exporting the checkpoint of `step` if it is due and no export is running. Returns immediately."""
        every, output = self._settings.every_steps, self._run.export(step)
        done = (output / CERTIFICATE).is_file() and (not self._humaneval or self._results(step).is_file())
        if every is None or step % every or step == 0 or done:
            return
        if self._thread is not None and self._thread.is_alive():
            log.warning("step %d: not exported, because the previous export is still running", step)
            return
        self._thread = threading.Thread(target=self._export, args=(step, output), daemon=True)
        self._thread.start()

    def finish(self, wait: bool) -> None:
        """Wait for the running export, or terminate it and leave it to the resumed run."""
        if self._thread is None:
            return
        if not wait:
            self._given_up.set()
            if self._process is not None:
                self._process.terminate()
        self._thread.join()

    def _export(self, step: int, output: Path) -> None:
        links = self._run.exports / f".step-{step:08d}"
        try:
            if not (output / CERTIFICATE).is_file() and not self._convert(step, output, links):
                return
            if self._humaneval:
                self._score(step, output)
            self._remove_old()
        except OSError as error:
            log.warning("step %d: not exported (%s)", step, error)
        finally:
            shutil.rmtree(links, ignore_errors=True)

    def _convert(self, step: int, output: Path, links: Path) -> bool:
        """Convert a checkpoint, and push the result. Returns whether it was converted."""
        source = _linked(self._run.checkpoint(step), links)
        settings = self._settings
        arguments = ["convert", str(source), str(output), "--dtype", settings.dtype]
        if settings.sequences is not None:
            arguments += ["--sequences", str(settings.sequences)]
        if not self._call(step, "exported", arguments):
            return False
        log.info("step %d: exported to %s", step, output)
        if settings.hub is not None:
            visibility = "--private" if settings.private else "--public"
            if self._call(step, "pushed", ["push", str(output), settings.hub, "--branch", self._branch, visibility]):
                log.info("step %d: pushed to %s, branch %s", step, settings.hub, self._branch)
        return True

    def _results(self, step: int) -> Path:
        return self._run.humaneval(step) / "results.json"

    def _score(self, step: int, output: Path) -> None:
        """Sample and score HumanEval; what an interrupted call has sampled is kept."""
        results = self._results(step)
        arguments = ["evaluate", "humaneval", str(output), "-n", str(self._humaneval), "--temperature", "0.2"]
        arguments += ["-o", str(results.parent)]
        if self._tensorboard:
            # A directory of its own: TensorBoard reads one file of a directory at a time.
            arguments += ["--tensorboard", str(self._run.tensorboard / "humaneval"), "--step", str(step)]
        if self._call(step, "scored on HumanEval", arguments):
            scores = read_json(results, "results of HumanEval")["temperatures"]["0.2"]["scores"]
            passed = sum(each["passed"] > 0 for each in scores["problems"].values())
            value = 100 * scores["pass_at_k"]["pass@1"]["value"]
            log.info("step %d: HumanEval pass@1 %.2f %%, %d of 164 problems passed", step, value, passed)

    def _call(self, step: int, done: str, arguments: list[str]) -> bool:
        """Run a command and log its error message if it fails. Returns whether it succeeded."""
        if self._given_up.is_set():
            return False
        environment = without_launcher(os.environ)
        # The GPU is in use by training.
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
        output, _ = self._process.communicate()
        if self._process.returncode and not self._given_up.is_set():
            lines = output.strip().splitlines() or [f"exit code {self._process.returncode}"]
            log.warning("step %d: not %s. Training continues. %s", step, done, lines[-1])
        return self._process.returncode == 0

    def _remove_old(self) -> None:
        finished = [path for path in sorted(self._run.exports.glob("step-*")) if (path / CERTIFICATE).is_file()]
        for old in finished[: -self._settings.keep_last]:
            shutil.rmtree(old)


def _linked(checkpoint: Path, links: Path) -> Path:
    """Hard-link the checkpoint's files, which keeps them if it is removed; without hard links, return it itself."""
    shutil.rmtree(links, ignore_errors=True)
    # A checkpoint's run directory is expected two levels up.
    target = links / "checkpoints" / checkpoint.name
    try:
        shutil.copytree(checkpoint, target, copy_function=os.link)
        for name in ("recipe.yaml", "ds_config.json"):
            os.link(checkpoint.parent.parent / name, links / name)
        shutil.copytree(checkpoint.parent.parent / "tokenizer", links / "tokenizer", copy_function=os.link)
    except OSError:
        return checkpoint
    return target

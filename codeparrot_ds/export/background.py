"""Convert a run's checkpoints, and push them, while it trains: in processes of their own, one checkpoint at a time."""

import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

from codeparrot_ds.export.certificate import CERTIFICATE
from codeparrot_ds.run.directory import RunDirectory
from codeparrot_ds.run.sections import Export
from codeparrot_ds.system.launched import without_launcher

log = logging.getLogger("codeparrot_ds")
# It ends when the thread that started it ends, and leaves the cores to training.
_COMMAND = """
import os
from codeparrot_ds.system.jobs import die_with_parent
os.nice(10)
die_with_parent()
from codeparrot_ds.cli import main
main()
"""


class BackgroundExport:
    """Exports of one run, asked for by its rank 0. Nothing that goes wrong here stops training: the log tells it."""

    def __init__(self, run: RunDirectory, settings: Export, branch: str) -> None:
        """branch: on the Hub, where the recipe names a repository."""
        self._run, self._settings, self._branch = run, settings, branch
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[str] | None = None
        self._given_up = threading.Event()

    def start(self, step: int) -> None:
        """Export the published checkpoint of `step` if it is due, and none is still being exported. Returns at once."""
        every, output = self._settings.every_steps, self._run.export(step)
        if every is None or step % every or step == 0 or (output / CERTIFICATE).is_file():
            return
        if self._thread is not None and self._thread.is_alive():
            log.warning("step %d: not exported, for the export before it still goes on", step)
            return
        self._thread = threading.Thread(target=self._export, args=(step, output), daemon=True)
        self._thread.start()

    def finish(self, wait: bool) -> None:
        """Wait for the export under way; or end it, and leave it to the run that goes on."""
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
            source = _linked(self._run.checkpoint(step), links)
            settings = self._settings
            arguments = ["convert", str(source), str(output), "--dtype", settings.dtype]
            if settings.sequences is not None:
                arguments += ["--sequences", str(settings.sequences)]
            if not self._call(step, "exported", arguments):
                return
            log.info("step %d: exported to %s", step, output)
            if settings.hub is not None:
                visibility = "--private" if settings.private else "--public"
                if self._call(
                    step, "pushed", ["push", str(output), settings.hub, "--branch", self._branch, visibility]
                ):
                    log.info("step %d: pushed to %s, branch %s", step, settings.hub, self._branch)
            self._remove_old()
        except OSError as error:
            log.warning("step %d: not exported (%s)", step, error)
        finally:
            shutil.rmtree(links, ignore_errors=True)

    def _call(self, step: int, done: str, arguments: list[str]) -> bool:
        """Run a verb; the log has its message when it fails."""
        if self._given_up.is_set():
            return False
        environment = without_launcher(os.environ)
        # The GPU is taken by training.
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said, _ = self._process.communicate()
        if self._process.returncode and not self._given_up.is_set():
            lines = said.strip().splitlines() or [f"it ended with {self._process.returncode}"]
            log.warning("step %d: not %s. Training goes on. %s", step, done, lines[-1])
        return self._process.returncode == 0

    def _remove_old(self) -> None:
        finished = [path for path in sorted(self._run.exports.glob("step-*")) if (path / CERTIFICATE).is_file()]
        for old in finished[: -self._settings.keep_last]:
            shutil.rmtree(old)


def _linked(checkpoint: Path, links: Path) -> Path:
    """The checkpoint's files under other names, which stay when it is removed; itself where a disk has no links."""
    shutil.rmtree(links, ignore_errors=True)
    # A checkpoint's run is found two directories up.
    target = links / "checkpoints" / checkpoint.name
    try:
        shutil.copytree(checkpoint, target, copy_function=os.link)
        for name in ("recipe.yaml", "ds_config.json"):
            os.link(checkpoint.parent.parent / name, links / name)
        shutil.copytree(checkpoint.parent.parent / "tokenizer", links / "tokenizer", copy_function=os.link)
    except OSError:
        return checkpoint
    return target

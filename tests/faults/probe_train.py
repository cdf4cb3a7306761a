"""Run by ranks: train a recipe like `codeparrot_ds.train`, with faults injected at a given step on a given rank.

Usage: probe_train.py RECIPE [--set KEY=VALUE ...] --marks DIRECTORY --fault NAME:RANK:STEP ...

    kill     SIGKILL during optimizer step STEP, after its backward
    once     the same, but only if nothing was killed before
    crash    an exception at that point
    again    SIGKILL at that point, but only when the run has gone back and repeats the step
    pause    the rank creates the file `paused` and waits for the file `go`; on a stop request it creates `told`
    hold     the same with the files `held-STEP` and `go-STEP`
    nan      one gradient is NaN in step STEP
    nans     one gradient is NaN in each step from STEP on
    flip     one bit of this rank's weights is flipped before step STEP
    bad      the samples of step STEP have ten times their loss, in whichever step and on whichever rank they occur

The following are injected while the checkpoint after STEP optimizer steps is saved.

    torn     SIGKILL when half of a file of this rank is written
    full     the disk is full when this rank writes its files
    slow     this rank waits before its fsync, records what others have published by then, and is killed
    term     SIGTERM before the checkpoint is renamed
    manifest, name, pointer, pointed, retention
             SIGKILL before the manifest is in place, before the checkpoint is renamed, before `latest` is written,
             before it is replaced, and when an older checkpoint has just lost its manifest

    leap     SIGKILL when a run goes back, before the list of excluded ranges is in place; STEP is ignored
"""

import argparse
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from codeparrot_ds import train
from codeparrot_ds.training.loop import Trainer
from codeparrot_ds.training.metrics import Step

SLOW_SECONDS = 2.0
PAUSE_SECONDS = 120.0
RANK = int(os.environ["RANK"])


class Fault(NamedTuple):
    """A fault, its rank and its step."""

    name: str
    rank: int
    step: int


def parse(text: str) -> Fault:
    """Parse NAME:RANK:STEP."""
    name, rank, step = text.split(":")
    return Fault(name, int(rank), int(step))


def main() -> None:
    """Arm the faults of this rank and train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fault", type=parse, action="append", default=[])
    parser.add_argument("--marks", type=Path, required=True)
    options, arguments = parser.parse_known_args()
    for fault in options.fault:
        if fault.name == "bad":
            multiply_loss(fault.step)
        elif fault.rank == RANK:
            if fault.name in IN_STEP:
                during_steps(fault, options.marks)
            elif fault.name in IN_SAVING:
                while_saving(fault, options.marks)
            else:
                raise ValueError(fault.name)
    train.end(train.main(arguments))


def die(marks: Path) -> NoReturn:
    """Record the time, and die by SIGKILL."""
    (marks / "killed").write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("nobody outlives SIGKILL")


# In a step


def pause(trainer: Trainer, marks: Path, here: str = "paused", go: str = "go") -> None:
    """Wait for a file created by the test."""
    (marks / here).touch()
    deadline = time.monotonic() + PAUSE_SECONDS
    nothing = trainer.stop_requests.reason
    while not (marks / go).exists() and time.monotonic() < deadline:
        if trainer.stop_requests.reason != nothing:
            (marks / "told").touch()
        time.sleep(0.02)


def crash(trainer: Trainer, marks: Path) -> None:
    """Raise an exception like a defect of the package."""
    raise ZeroDivisionError("made by the test")


def flip_bit(trainer: Trainer, marks: Path) -> None:
    """Flip the lowest bit of one weight."""
    weight = next(iter(trainer.engine.module.parameters()))
    weight.data.view(torch.int32).view(-1)[7] ^= 1


IN_STEP: dict[str, Callable[[Trainer, Path], None]] = {
    "kill": lambda trainer, marks: die(marks),
    "once": lambda trainer, marks: None if (marks / "killed").exists() else die(marks),
    "again": lambda trainer, marks: die(marks),
    "crash": crash,
    "pause": pause,
    "hold": lambda trainer, marks: pause(trainer, marks, f"held-{trainer.step}", f"go-{trainer.step}"),
    "flip": flip_bit,
    "nan": lambda trainer, marks: None,  # affects a gradient, so before the step
    "nans": lambda trainer, marks: None,
}


def during_steps(fault: Fault, marks: Path) -> None:
    """Inject `fault` after the backward pass of its step, or during it."""
    train_step = Trainer.train_step

    def faulty_step(self: Trainer) -> Step:
        now = self.step >= fault.step if fault.name == "nans" else self.step == fault.step
        if not now or (fault.name == "again" and not self.skipped_ranges):
            return train_step(self)
        backward = self.engine.backward

        def faulty_backward(loss: torch.Tensor) -> None:
            backward(loss)
            IN_STEP[fault.name](self, marks)

        hook = None
        if fault.name in ("nan", "nans"):
            last = [parameter for name, parameter in self.engine.module.named_parameters() if "ln_f.weight" in name]
            hook = last[0].register_hook(lambda gradient: gradient * torch.nan)
        self.engine.backward = faulty_backward
        try:
            return train_step(self)
        finally:
            self.engine.backward = backward
            if hook is not None:
                hook.remove()

    Trainer.train_step = faulty_step  # type: ignore[method-assign]


def multiply_loss(step: int) -> None:
    """Multiply by ten the loss of the samples that `step` has in a fault-free run, wherever they occur."""
    train_step, loss_of = Trainer.train_step, Trainer.loss
    bad_now = False

    def note_samples(self: Trainer) -> Step:
        nonlocal bad_now
        size = self.recipe.batch.global_batch_size
        bad = self.data.order(self.recipe.seed).take(step * size, size)
        bad_now = bool(set(bad.tolist()) & set(self.sequences(self.step).tolist()))
        try:
            return train_step(self)
        finally:
            bad_now = False

    Trainer.train_step = note_samples  # type: ignore[method-assign]
    Trainer.loss = lambda self, ids: loss_of(self, ids) * (10 if bad_now else 1)  # type: ignore[method-assign]


# While a checkpoint is saved


def while_saving(fault: Fault, marks: Path) -> None:
    """Inject `fault` at the file operation that it is named for."""
    name = f"step-{fault.step:08d}"
    if fault.name in ("torn", "full"):
        save = torch.save

        def faulty_save(state: Any, path: Any, *args: Any, **how: Any) -> None:
            file = Path(path.name if hasattr(path, "write") else path)
            if file.parent.name != f"{name}.tmp":
                return save(state, path, *args, **how)
            if fault.name == "full":
                fill_disk(file.parent.parent.parent / "ballast")
                return save(state, path, *args, **how)
            content = io.BytesIO()
            save(state, content)
            file.write_bytes(content.getvalue()[: len(content.getvalue()) // 2])
            die(marks)

        torch.save = faulty_save  # type: ignore[assignment]
        return
    happened = armed = removing = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        """Audit hook, called before an operation is performed."""
        nonlocal happened, armed, removing
        if happened or event not in ("open", "os.rename", "os.remove", "os.rmdir"):
            return
        places = [Path(str(each)) for each in arguments[:2]]
        if fault.name == "retention":
            if event == "os.rename" and places[1].name == "latest":
                armed = places[1].with_name(name).is_dir()
            elif armed and not removing:
                removing = event == "os.remove" and places[0].name == "manifest.json"
            elif removing:  # it has just been removed
                happened = True
                die(marks)
        elif happens(fault, name, event, places):
            happened = True
            if fault.name == "term":
                os.kill(os.getpid(), signal.SIGTERM)
                return
            if fault.name == "slow":
                time.sleep(SLOW_SECONDS)
                (marks / "seen").write_text(json.dumps(published(places[0].parent.parent)))
            die(marks)

    sys.addaudithook(hook)


def happens(fault: Fault, name: str, event: str, places: list[Path]) -> bool:
    """Whether the upcoming operation is that of `fault`, during the save of checkpoint `name`."""
    source, target = places[0], places[-1]
    if fault.name == "slow":
        return event == "open" and source.parent.name == f"{name}.tmp"
    if fault.name == "pointer":
        return event == "open" and source.name == "latest.tmp" and source.with_name(name).is_dir()
    return (
        event == "os.rename"
        and {
            "manifest": target.name == "manifest.json" and target.parent.name == f"{name}.tmp",
            "name": target.name == name,
            "term": target.name == name,
            "pointed": target.name == "latest" and target.with_name(name).is_dir(),
            "leap": target.name == "left_out.json",
        }[fault.name]
    )


def published(checkpoints: Path) -> tuple[str | None, list[str]]:
    """Content of `latest`, and the names of all checkpoints, finished or not."""
    latest = checkpoints / "latest"
    return latest.read_text() if latest.exists() else None, sorted(path.name for path in checkpoints.glob("step-*"))


def fill_disk(path: Path) -> None:
    """Fill the file system of `path`."""
    with open(path, "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass


IN_SAVING = {"torn", "full", "slow", "term", "manifest", "name", "pointer", "pointed", "retention", "leap"}


if __name__ == "__main__":
    main()

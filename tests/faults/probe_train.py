"""Run by ranks: train a recipe as `codeparrot_ds.train` does, with faults that happen at a given step on a given rank.

Usage: probe_train.py RECIPE [--set KEY=VALUE ...] --marks DIRECTORY --fault NAME:RANK:STEP ...

    kill     SIGKILL in the midst of optimizer step STEP, after its backward
    once     the same, but only if nothing was killed before
    crash    an exception there
    again    SIGKILL there, but not before the run has gone back and takes the step again
    pause    the rank waits there for the file `go`, having made the file `paused`; when it is told to stop, `told`
    hold     the same for the file `go-STEP`, having made `held-STEP`
    nan      one gradient is not a number, in step STEP
    nans     so it is in each step from STEP on
    flip     one bit of this rank's weights is another, before step STEP is done
    bad      the samples of step STEP have ten times their loss, whenever they are trained on, on any rank

The following happen while the checkpoint after STEP optimizer steps is saved.

    torn     SIGKILL when half of a file of this rank is written
    full     the disk is full when this rank writes its files
    slow     this rank waits before it flushes its files, notes what others have published meanwhile, and is killed
    term     SIGTERM before the checkpoint gets its name
    manifest, name, pointer, pointed, retention
             SIGKILL before the manifest is in place, before the checkpoint gets its name, before `latest` is written,
             before it is replaced, and when an older checkpoint has just lost its manifest

    leap     SIGKILL when a run goes back, before the list of what it leaves out is in place; STEP means nothing
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
    """What happens to whom, and when."""

    name: str
    rank: int
    step: int


def parse(text: str) -> Fault:
    """NAME:RANK:STEP."""
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
    """End as kill -9 does, and leave the time of it."""
    (marks / "killed").write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("nobody outlives SIGKILL")


# In a step


def pause(trainer: Trainer, marks: Path, here: str = "paused", go: str = "go") -> None:
    """Wait for a word from outside."""
    (marks / here).touch()
    deadline = time.monotonic() + PAUSE_SECONDS
    nothing = trainer.stop_requests.reason
    while not (marks / go).exists() and time.monotonic() < deadline:
        if trainer.stop_requests.reason != nothing:
            (marks / "told").touch()
        time.sleep(0.02)


def crash(trainer: Trainer, marks: Path) -> None:
    """A defect of ours."""
    raise ZeroDivisionError("made by the test")


def flip_bit(trainer: Trainer, marks: Path) -> None:
    """The lowest bit of one weight."""
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
    "nan": lambda trainer, marks: None,  # happens to a gradient, before
    "nans": lambda trainer, marks: None,
}


def during_steps(fault: Fault, marks: Path) -> None:
    """Have `fault` happen after the backward of its step, or in it."""
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
    """What the samples of `step` are in an undisturbed run has ten times its loss, in whatever step it comes."""
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
    """Have `fault` happen at the operation on files that it is named for."""
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
        """Python's audit hooks are told of an operation before it happens."""
        nonlocal happened, armed, removing
        if happened or event not in ("open", "os.rename", "os.remove", "os.rmdir"):
            return
        places = [Path(str(each)) for each in arguments[:2]]
        if fault.name == "retention":
            if event == "os.rename" and places[1].name == "latest":
                armed = places[1].with_name(name).is_dir()
            elif armed and not removing:
                removing = event == "os.remove" and places[0].name == "manifest.json"
            elif removing:  # it has just gone
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
    """Whether the operation that is about to happen is the one of `fault`, in the saving of checkpoint `name`."""
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
    """Leave no room on the file system of `path`."""
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

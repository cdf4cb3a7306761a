"""Run by ranks: a trial of a recipe that records memory in each phase of a step.

Usage: probe_plan.py RECIPE OUTPUT
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
from deepspeed.accelerator import get_accelerator

import codeparrot_ds.training.memory as memory_module
from codeparrot_ds import trial
from codeparrot_ds.run.recipe import load_recipe
from codeparrot_ds.system.files import write_json
from codeparrot_ds.train import end
from codeparrot_ds.training.memory import HostMemory

STEPS = 3
RELEASE_SECONDS = 0.05  # gloo's threads release a reduced bucket shortly after the collective has returned
PHASES = ("forward", "backward", "step")  # methods of the engine
get_accelerator().is_fp16_supported = lambda: True  # DeepSpeed rejects it if the CPU lacks the instructions


class MemoryOfPhases(HostMemory):
    """Also records the peak in each phase of every step but the first.

    Attributes:
        phases: peak bytes by phase.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phases: dict[str, int] = {}
        self._most, self._steps = 0, 0
        for name in PHASES:
            setattr(deepspeed.DeepSpeedEngine, name, self._watched(name, getattr(deepspeed.DeepSpeedEngine, name)))

    @property
    def peak_bytes(self) -> int:
        return max(self._most, super().peak_bytes)

    def reset_peak(self) -> None:
        super().reset_peak()
        self._most, self._steps = 0, self._steps + 1

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            if name == "step":
                time.sleep(RELEASE_SECONDS)
            self._begin_anew()
            found = call(*arguments, **options)
            peak = self._begin_anew()
            if self._steps:
                self.phases[name] = max(self.phases.get(name, 0), peak)
            return found

        return watched

    def _begin_anew(self) -> int:
        peak = HostMemory.peak_bytes.__get__(self)
        self._most = max(self._most, peak)
        super().reset_peak()
        return peak


recipe, output = map(Path, sys.argv[1:3])
memory = MemoryOfPhases()
memory_module.device_memory = lambda device: memory
found = trial.run(load_recipe(recipe), STEPS)
if os.environ["RANK"] == "0":
    write_json(output, {**found, "phases": memory.phases})
end(0)

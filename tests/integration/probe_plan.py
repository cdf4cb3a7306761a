"""Run by ranks: trials of several recipes, each in processes of its own, forked once the libraries are imported.

Usage: probe_plan.py TRIALS.json, a list of {"recipe": FILE, "ranks": N, "port": N, "output": FILE}.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import transformers.models.gpt2.modeling_gpt2  # noqa: F401
from deepspeed.accelerator import get_accelerator

import codeparrot_ds.training.memory as memory_module
from codeparrot_ds import trial
from codeparrot_ds.files import write_json
from codeparrot_ds.recipe import load_recipe
from codeparrot_ds.training.memory import HostMemory

STEPS = 3
PHASES = ("forward", "backward", "step")  # methods of the engine
get_accelerator().is_fp16_supported = lambda: True  # DeepSpeed refuses it where the CPU has no instructions for it


class MemoryOfPhases(HostMemory):
    """Looks for the most in each phase of every step but the first, too.

    Attributes:
        phases: the most bytes by phase.
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


rank = int(os.environ["RANK"])
for each in json.loads(Path(sys.argv[-1]).read_text()):
    if rank >= each["ranks"]:
        continue
    child = os.fork()
    if child == 0:
        ranks = str(each["ranks"])
        os.environ.update(MASTER_PORT=str(each["port"]), WORLD_SIZE=ranks, LOCAL_SIZE=ranks)
        code = 1
        try:
            memory = MemoryOfPhases()
            memory_module.device_memory = lambda device, memory=memory: memory
            found = trial.run(load_recipe(Path(each["recipe"])), STEPS)
            if rank == 0:
                write_json(Path(each["output"]), {**found, "phases": memory.phases})
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    if os.waitpid(child, 0)[1] != 0:
        sys.exit(f"{each['recipe']}: failed on rank {rank}")

"""Run by ranks: trials of several recipes, each in processes of its own, forked once the libraries are imported.

Usage: probe_plan.py TRIALS.json, a list of {"recipe": FILE, "ranks": N, "port": N, "output": FILE}.
"""

import json
import os
import sys
from pathlib import Path

import deepspeed  # noqa: F401 (imported once, for all forks)
import transformers.models.gpt2.modeling_gpt2  # noqa: F401
from deepspeed.accelerator import get_accelerator

from codeparrot_ds import trial
from codeparrot_ds.files import write_json
from codeparrot_ds.recipe import load_recipe

STEPS = 3
get_accelerator().is_fp16_supported = lambda: True  # DeepSpeed refuses it where the CPU has no instructions for it

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
            found = trial.run(load_recipe(Path(each["recipe"])), STEPS)
            if rank == 0:
                write_json(Path(each["output"]), found)
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    if os.waitpid(child, 0)[1] != 0:
        sys.exit(f"{each['recipe']}: failed on rank {rank}")

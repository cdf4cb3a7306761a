"""Ours on one GPU: many ways to run a model after one another, with one engine. Usage: deepspeed gpu_ours.py JOB.json

Each way is taken a few steps of one micro-batch; a line of JSON is written for each as soon as it is done.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from codeparrot_ds.planning.machine import find_machine
from codeparrot_ds.planning.plan import Choice, predict
from codeparrot_ds.run.recipe import load_recipe
from codeparrot_ds.train import end
from codeparrot_ds.trial import take_steps, trainer_on_random_ids


def main() -> None:
    """Take each way of the job."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path)
    parser.add_argument("--local_rank", type=int, help="set by deepspeed")
    job = json.loads(parser.parse_args().job.read_text())
    recipe = load_recipe(
        Path(job["recipe"]), ["batch.global_batch_size=1", "batch.micro_batch_size=1", *job["overrides"]]
    )
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    machine = find_machine(recipe, 1, on_cpu=on_cpu)
    with trainer_on_random_ids(recipe) as (trainer, memory), open(job["output"], "a") as output:
        import torch

        from codeparrot_ds.training.engine import forget_trace
        from codeparrot_ds.training.model import recompute_activations

        for number, (recompute, micro_batch) in enumerate(job["ways"]):
            way = recipe.model_copy(
                update={
                    "batch": recipe.batch.model_copy(
                        update={"global_batch_size": micro_batch, "micro_batch_size": "auto"}
                    )
                }
            )
            choice = Choice(recipe.engine.deepspeed, recompute, micro_batch)
            prediction = predict(way, choice, machine)
            trainer.recipe = choice.applied(way)
            recompute_activations(trainer.engine.module, recompute)
            forget_trace(trainer.engine)
            row: dict[str, Any] = {
                "part": job["part"],
                "stage": prediction.layout.stage,
                "compile": recipe.engine.compile,
                "recompute": recompute,
                "micro_batch": micro_batch,
                "predicted_peak_bytes": prediction.memory.peak_bytes,
                "fits": prediction.fits,
                "device": memory.name,
                "flops_per_token": recipe.model.flops_per_token,
                "peak_flops": machine.cluster.gpu_flops,
            }
            last = number == len(job["ways"]) - 1
            trace = Path(job["trace"]) if last and job.get("trace") else None
            try:
                take_steps(trainer, memory, job["warm_up"])
                row |= take_steps(trainer, memory, job["steps"], trace)
            except torch.OutOfMemoryError:
                row["out_of_memory"] = True
            output.write(json.dumps(row) + "\n")
            output.flush()
            print(json.dumps(row), file=sys.stderr, flush=True)
            if row.get("out_of_memory"):
                break  # what the engine holds in mid-step is not known; larger ways come later in the list


if __name__ == "__main__":
    main()
    end(0)

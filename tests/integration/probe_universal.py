"""Run by ranks: have DeepSpeed itself load a universal checkpoint, and save what its engine then holds.

Usage: probe_universal.py RECIPE DS_CONFIG UNIVERSAL OUT
"""

import dataclasses
import sys
from pathlib import Path

import torch

from codeparrot_ds.run.directory import Checkpoint, RunDirectory, classes_in_checkpoints
from codeparrot_ds.run.ds_config import load_ds_config, resolve
from codeparrot_ds.run.recipe import load_recipe
from codeparrot_ds.train import end
from codeparrot_ds.training import ranks as rank_module
from codeparrot_ds.training.checkpoint import Saving
from codeparrot_ds.training.engine import build_engine
from codeparrot_ds.training.model import build_model

recipe_path, ds_config_path, universal, out = [Path(each) for each in sys.argv[1:] if "--local_rank" not in each]
recipe = load_recipe(recipe_path, [f"engine.deepspeed={ds_config_path}", "batch.global_batch_size=6"])
ranks = rank_module.join()
ds_config = resolve(load_ds_config(ds_config_path), recipe, ranks.world_size)
ds_config["checkpoint"] = {"load_universal": True}
engine = build_engine(build_model(recipe.model, 0, recipe.seed + 1, ds_config), recipe, ds_config)
torch.serialization.add_safe_globals(classes_in_checkpoints())  # ranks load nothing else
path, state = engine.load_checkpoint(str(universal.parent), tag=universal.name)
assert path is not None
checkpoint = Checkpoint.read(universal)
assert (state["step"], state["samples_seen"]) == (checkpoint.step, checkpoint.samples_seen)
assert engine.global_steps == checkpoint.step
run = RunDirectory(out)
again = dataclasses.replace(
    checkpoint,
    path=run.checkpoint(checkpoint.step),
    zero_stage=engine.zero_optimization_stage(),
    world_size=ranks.world_size,
    universal=False,
    files={},
)
Saving.begin(engine, run, again, ranks).publish(keep_last=1)
rank_module.leave()
end(0)

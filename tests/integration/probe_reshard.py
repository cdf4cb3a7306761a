"""Run by ranks: load the newest checkpoint of a recipe's run by parameter, and save it elsewhere.

Usage: probe_reshard.py RECIPE DS_CONFIG OUT
"""

import dataclasses
import sys
from pathlib import Path

from codeparrot_ds.run.directory import RunDirectory
from codeparrot_ds.run.ds_config import load_ds_config, resolve
from codeparrot_ds.run.recipe import load_recipe
from codeparrot_ds.train import end
from codeparrot_ds.training import ranks as rank_module
from codeparrot_ds.training import reshard
from codeparrot_ds.training.checkpoint import Saving
from codeparrot_ds.training.engine import build_engine
from codeparrot_ds.training.model import build_model

recipe_path, ds_config_path, out = [Path(each) for each in sys.argv[1:] if not each.startswith("--local_rank")]
recipe = load_recipe(recipe_path, [f"engine.deepspeed={ds_config_path}"])
checkpoint = RunDirectory(recipe.run_directory).newest_checkpoint()
ranks = rank_module.join()
ds_config = resolve(load_ds_config(ds_config_path), recipe, ranks.world_size)
engine = build_engine(build_model(recipe.model, 0, recipe.seed + 1, ds_config), recipe, ds_config)
reshard.load_resharded(engine, checkpoint, ranks)
run = RunDirectory(out)
again = dataclasses.replace(
    checkpoint,
    path=run.checkpoint(checkpoint.step),
    zero_stage=engine.zero_optimization_stage(),
    world_size=ranks.world_size,
    files={},
)
Saving.begin(engine, run, again, ranks).publish(keep_last=1)
rank_module.leave()
end(0)

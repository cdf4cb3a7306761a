"""Run by ranks: build a recipe's engine, write its state at step 0, and save a checkpoint of it.

Usage: probe_step0.py RECIPE OUT STAGE PRECISION
"""

import argparse
import json
from pathlib import Path

import torch

from codeparrot_ds.run.directory import Checkpoint, RunDirectory
from codeparrot_ds.run.ds_config import load_ds_config, resolve
from codeparrot_ds.run.recipe import load_recipe
from codeparrot_ds.shards.order import Order
from codeparrot_ds.shards.sequences import PackedSequences
from codeparrot_ds.system.files import digest_bytes
from codeparrot_ds.train import end
from codeparrot_ds.training import ranks as rank_module
from codeparrot_ds.training.checkpoint import Saving
from codeparrot_ds.training.engine import build_engine
from codeparrot_ds.training.model import build_model, next_token_loss

parser = argparse.ArgumentParser()
parser.add_argument("recipe", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("stage", type=int)
parser.add_argument("precision")
parser.add_argument("--local_rank")
options = parser.parse_args()

recipe = load_recipe(options.recipe, [f"engine.precision={options.precision}", f"name={options.out.stem}"])
ds_config = load_ds_config(recipe.engine.deepspeed)
ds_config["zero_optimization"]["stage"] = options.stage
ranks = rank_module.join()
ds_config = resolve(ds_config, recipe, ranks.world_size)
network = build_model(recipe.model, 0, recipe.seed, ds_config)
engine = build_engine(network, recipe, ds_config)

import deepspeed  # noqa: E402 (after the package has selected the operators that DeepSpeed builds)

names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
weights = {}
for name, parameter in engine.module.named_parameters():
    with deepspeed.zero.GatheredParameters(parameter):
        weights[name] = digest_bytes(parameter.detach().float().contiguous().numpy().data)
train = PackedSequences.open(recipe.data.shards, "train", recipe.model.seq_len)
share = recipe.batch.global_batch_size // ranks.world_size
ids = train.batch(Order(len(train), recipe.seed).take(0, recipe.batch.global_batch_size)[ranks.slice(share)])
tokens = torch.from_numpy(ids)
with torch.no_grad():
    loss = next_token_loss(engine(input_ids=tokens[:, :-1]).logits, tokens[:, 1:]).double()
loss = (ranks.sum(loss) / ranks.world_size).item()
# The innermost optimizer, regardless of ZeRO's wrapper: it shows the weight decay of each parameter.
grouped = (
    getattr(engine.optimizer, "fp16_groups", None)
    or getattr(engine.optimizer, "bit16_groups", None)
    or getattr(engine.optimizer, "bf16_groups", None)
    or [group["params"] for group in engine.optimizer.param_groups]
)
groups = [
    {"weight_decay": group["weight_decay"], "parameters": sorted(names[id(p)] for p in parameters)}
    for group, parameters in zip(engine.optimizer.param_groups, grouped, strict=True)
]
run = RunDirectory(recipe.run_directory)
checkpoint = Checkpoint(run.checkpoint(0), 0, 0, 0, options.stage, ranks.world_size, options.precision, {}, {}, None)
Saving.begin(engine, run, checkpoint, ranks).publish(keep_last=1)
if ranks.rank == 0:
    accumulated = str(engine.get_data_types()[1])
    found = {"weights": weights, "loss": loss, "groups": groups, "accumulated": accumulated, "run": str(run.path)}
    options.out.write_text(json.dumps(found))
rank_module.leave()
end(0)

"""Run by ranks: train a recipe in fp16 on CPU cores, which DeepSpeed rejects if they lack fp16 instructions.

Usage: probe_fp16.py RECIPE [--set KEY=VALUE …]
"""

import sys

from deepspeed.accelerator import get_accelerator

from codeparrot_ds import train

get_accelerator().is_fp16_supported = lambda: True
train.end(train.main([argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]))

"""nanoGPT's model and loop on random ids, on one GPU or CPU. Usage: python gpu_nanogpt.py JOB.json

The default loop of its `train.py`: autocast to bf16 on a GPU, fused AdamW from its own `configure_optimizers`,
gradients accumulated and clipped, the next micro-batch prefetched while the GPU computes, the loss read at every step,
torch.compile. Evaluation, checkpoints and the schedule are omitted. Biases are kept, as in GPT-2, and the weights are
initialized on the GPU.

Keys of the job:
    nanogpt: directory with nanoGPT's `model.py`.
    model: {"vocab_size", "seq_len", "n_layer", "n_embd", "n_head"}; others are ignored.
    micro_batch: sequences.
    accumulation: micro-batches per step; default 1.
    steps: number of steps, warm-up included.
    compile: whether to compile; default true.
    output: file for the report, see standalone.py, with `last_loss`.
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from standalone import Report, memory_may_run_out

LEARNING_RATE, WEIGHT_DECAY, BETAS, CLIPPING = 2e-4, 0.1, (0.9, 0.95), 1.0
IDS = 1 << 20


def main() -> None:
    """Train and report each step."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    report = Report(job["output"])
    with memory_may_run_out(report):
        train(job, report)


def train(job: dict[str, Any], report: Report) -> None:
    """Run all steps of the job."""
    sys.path.insert(0, job["nanogpt"])
    from model import GPT, GPTConfig  # type: ignore[import-not-found, unused-ignore]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(1337)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    shape = {key: job["model"][key] for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
    seq_len, micro_batch = job["model"]["seq_len"], job["micro_batch"]
    accumulation = job.get("accumulation", 1)
    with torch.device(device):
        network = GPT(GPTConfig(**shape, block_size=seq_len, dropout=0.0, bias=True))
    scaler = torch.amp.GradScaler(device, enabled=False)
    optimizer = network.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, BETAS, device)
    if job.get("compile", True):
        network = torch.compile(network)
    context = torch.amp.autocast(device, dtype=torch.bfloat16) if device == "cuda" else nullcontext()
    data = np.random.default_rng(1337).integers(shape["vocab_size"], size=IDS, dtype=np.uint16)

    def get_batch() -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, [micro_batch, seq_len] int64 each."""
        starts = torch.randint(len(data) - seq_len, (micro_batch,)).tolist()
        inputs = torch.stack([torch.from_numpy(data[i : i + seq_len].astype(np.int64)) for i in starts])
        targets = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + seq_len].astype(np.int64)) for i in starts])
        if device == "cpu":
            return inputs, targets
        return inputs.pin_memory().to(device, non_blocking=True), targets.pin_memory().to(device, non_blocking=True)

    inputs, targets = get_batch()
    report.begin()
    for _ in range(job["steps"]):
        for _ in range(accumulation):
            with context:
                _, loss = network(inputs, targets)
                loss = loss / accumulation
            inputs, targets = get_batch()
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIPPING)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        report.body["last_loss"] = loss.item() * accumulation
        report.step_ended()


if __name__ == "__main__":
    main()

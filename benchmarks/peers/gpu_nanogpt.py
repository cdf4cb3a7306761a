"""nanoGPT's model and loop on random ids. Usage: python gpu_nanogpt.py JOB.json

Its `train.py` as it is by default: autocast to bf16, fused AdamW by its own `configure_optimizers`, clipping, and
torch.compile.
The job names the directory with its `model.py`.
"""

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch


def main() -> None:
    """Train, and write down seconds of each step and the most memory."""
    job = json.loads(Path(sys.argv[1]).read_text())
    sys.path.insert(0, job["nanogpt"])
    from model import GPT, GPTConfig  # type: ignore[import-not-found, unused-ignore]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(1337)
    torch.backends.cuda.matmul.allow_tf32 = True
    shape = {key: job["model"][key] for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
    network = GPT(GPTConfig(**shape, block_size=job["model"]["seq_len"], dropout=0.0, bias=True)).to(device)
    optimizer = network.configure_optimizers(0.1, 2e-4, (0.9, 0.95), device)
    if job["compile"]:
        network = torch.compile(network)
    context = torch.amp.autocast(device, dtype=torch.bfloat16) if device == "cuda" else nullcontext()
    size = (job["steps"], job["micro_batch"], job["model"]["seq_len"] + 1)
    ids = torch.randint(job["model"]["vocab_size"], size).to(device)
    seconds = []
    for batch in ids:
        _synchronize()
        started = time.perf_counter()
        with context:
            _, loss = network(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _synchronize()
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    Path(job["output"]).write_text(json.dumps({"step_seconds": seconds, "peak_bytes": peak, "loss": loss.item()}))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

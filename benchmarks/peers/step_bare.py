"""A minimal DeepSpeed loop: forward, backward, step. Usage: deepspeed step_bare.py JOB.json"""

import deepspeed
import torch
import torch.nn.functional as F  # noqa: N812 (the customary name)
from steps import Stopwatch, read_job


def main() -> None:
    """Train on the job's batches."""
    job = read_job()
    deepspeed.init_distributed()
    network = job.network()
    engine, *_ = deepspeed.initialize(model=network, optimizer=job.optimizer(network), config=job.engine)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    micro = engine.train_micro_batch_size_per_gpu()
    # This rank's slice of each step as micro-batches, [steps, accumulation, micro, seq_len + 1], on its device.
    ids = job.ids().unflatten(1, (world_size, -1, micro))[:, rank].to(engine.device)
    stopwatch = Stopwatch(job)
    for step in range(job.steps):
        for batch in ids[step]:
            logits = engine(input_ids=batch[:, :-1]).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
            engine.backward(loss)
            engine.step()
            stopwatch.losses.append(loss.detach())
        stopwatch.tick()
    stopwatch.finish()


if __name__ == "__main__":
    main()

"""Accelerate with DeepSpeed, as in CodeParrot's training script. Usage: deepspeed step_accelerate.py JOB.json

prepare, accumulate, backward, clip, step, scheduler; the script's logging and gathering of losses are omitted. Labels
are the inputs, which GPT-2 shifts itself: one target fewer per sequence than ours.
"""

from accelerate import Accelerator  # type: ignore[import-not-found, unused-ignore]
from accelerate.utils import DeepSpeedPlugin  # type: ignore[import-not-found, unused-ignore]
from steps import Stopwatch, read_job, tell_accelerate_the_backend
from torch.utils.data import DataLoader, TensorDataset
from transformers import get_scheduler


def main() -> None:
    """Train on the job's batches."""
    job = read_job()
    tell_accelerate_the_backend()
    engine = job.engine
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=engine),
        gradient_accumulation_steps=engine["gradient_accumulation_steps"],
        mixed_precision=job.precision if job.precision != "fp32" else "no",
    )
    network = job.network()
    optimizer = job.optimizer(network)
    scheduler = get_scheduler("constant", optimizer)
    micro = engine["train_micro_batch_size_per_gpu"]
    rows = TensorDataset(job.ids().flatten(0, 1)[:, :-1].contiguous())
    loader: DataLoader = DataLoader(rows, batch_size=micro, shuffle=False)
    network, optimizer, loader, scheduler = accelerator.prepare(network, optimizer, loader, scheduler)
    network.train()
    stopwatch = Stopwatch(job)
    for (batch,) in loader:
        with accelerator.accumulate(network):
            loss = network(batch, labels=batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(network.parameters(), job.gradient_clipping)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        stopwatch.losses.append(loss.detach())
        if accelerator.sync_gradients:
            stopwatch.tick()
    stopwatch.finish()


if __name__ == "__main__":
    main()

"""Compare the training step of two checkouts of this package on two CPU ranks.

Usage: python benchmarks/step_between.py OLD NEW [--rounds 10] [--steps 12]

OLD and NEW are checkouts. In each round both train a small GPT-2 at ZeRO-1 and ZeRO-3, in fp32 and bf16, one after the
other. The result is the ratio of the CPU time of both ranks per step, within a round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from codeparrot_ds.system.network import free_port

CASES = [(stage, precision) for stage in (1, 3) for precision in ("fp32", "bf16")]
SETTINGS = {
    "model.n_layer": 4,
    "model.n_embd": 256,
    "model.n_head": 4,
    "model.vocab_size": 8192,
    "model.seq_len": 256,
    "model.activation_checkpointing": "none",
    "batch.global_batch_size": 16,
    "batch.micro_batch_size": 4,
}

# Set where a tree's recipe sets them: older ones do not know these keys.
SAME = {"engine.float32_matmul_precision": "highest", "engine.loss_chunk_tokens": 4096}


def child(tree: Path, steps: int, output: Path) -> None:
    """Run one rank of a round; median CPU seconds per step of each case."""
    from codeparrot_ds.run.recipe import load_recipe
    from codeparrot_ds.train import end
    from codeparrot_ds.trial import trainer_on_random_ids

    found: dict[str, float] = {}
    quickstart = tree / "launch" / "recipes" / "quickstart.yaml"
    text = quickstart.read_text(encoding="utf-8")
    same = {key: value for key, value in SAME.items() if f"{key.partition('.')[2]}:" in text}
    for stage, precision in CASES:
        settings = (
            SETTINGS
            | same
            | {
                "engine.precision": precision,
                "engine.deepspeed": tree / "ds_configs" / f"zero{stage}.json",
            }
        )
        recipe = load_recipe(quickstart, [f"{key}={value}" for key, value in settings.items()])
        with trainer_on_random_ids(recipe) as (trainer, _):
            seconds = []
            for _ in range(steps + 2):
                started = time.process_time()
                trainer.train_step()
                trainer.stop_requests.finish_exchange()
                trainer.step += 1
                seconds.append(time.process_time() - started)
        found[f"ZeRO-{stage}, {precision}"] = statistics.median(seconds[2:])
    output.write_text(json.dumps(found), encoding="utf-8")
    end(0)


def run_round(tree: Path, steps: int) -> dict[str, float]:
    """Run both ranks of a tree; returns the sum of their CPU seconds."""
    with tempfile.TemporaryDirectory() as directory:
        of_both = {"PYTHONPATH": str(tree), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        of_both |= {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        outputs = [Path(directory, str(rank)) for rank in range(2)]
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, "--child", str(tree), str(steps), str(output)],
                env={**os.environ, **of_both, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=subprocess.DEVNULL,
            )
            for rank, output in enumerate(outputs)
        ]
        for process in ranks:
            if process.wait(300):
                sys.exit(f"{tree}: a rank ended with exit code {process.returncode}")
        both = [json.loads(output.read_text()) for output in outputs]
    return {case: sum(each[case] for each in both) for case in both[0]}


def main() -> None:
    """Run the rounds and print a table."""
    if sys.argv[1] == "--child":
        child(Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("trees", type=Path, nargs=2, metavar="TREE", help="old, new")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {}
    for number in range(options.rounds):
        order = options.trees if number % 2 == 0 else options.trees[::-1]
        results = {tree: run_round(tree.resolve(), options.steps) for tree in order}
        old, new = (results[tree] for tree in options.trees)
        for case in old:
            found.setdefault(case, []).append((old[case], new[case]))
        print(f"round {number + 1}", {case: f"{new[case] / old[case]:.3f}" for case in old}, flush=True)
    print("\n| | old, CPU ms per step | new | new : old, median | lowest | highest |\n|---|---|---|---|---|---|")
    for case, pairs in found.items():
        ratios = [new / old for old, new in pairs]
        old_ms, new_ms = (1e3 * statistics.median(each) for each in zip(*pairs, strict=True))
        spread = f"{statistics.median(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f}"
        print(f"| {case} | {old_ms:.1f} | {new_ms:.1f} | {spread} |")


if __name__ == "__main__":
    main()

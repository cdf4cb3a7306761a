"""Near-duplicates with datatrove: its four MinHash stages with its defaults, for English, one task.

5-grams of words, 14 buckets of 8 hashes; stage 4 reads the documents again and writes the kept ones. (The defaults
find more than CodeParrot's threshold asks for: half of the pairs at 0.72, and it compares nothing exactly.)

Usage: python datatrove_clean.py DIRECTORY OUTPUT
"""

import json
import sys
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers.jsonl import JsonlWriter


def main() -> None:
    """Run the stages, and print the number of documents kept."""
    source, output = sys.argv[1:]
    config = MinhashConfig()
    read = JsonlReader(source, text_key="content", glob_pattern="*.jsonl.gz")
    stages: list[list[PipelineStep]] = [
        [read, MinhashDedupSignature(f"{output}/signatures", config)],
        [MinhashDedupBuckets(f"{output}/signatures", f"{output}/buckets", config=config)],
        [MinhashDedupCluster(f"{output}/buckets", f"{output}/removed", config=config)],
        [read, MinhashDedupFilter(f"{output}/removed"), JsonlWriter(f"{output}/kept")],
    ]
    for number, stage in enumerate(stages, 1):
        tasks = config.num_buckets if number == 2 else 1
        LocalPipelineExecutor(stage, tasks=tasks, workers=1, logging_dir=f"{output}/logs-{number}").run()
    stats = json.loads((Path(output) / "logs-4" / "stats.json").read_text())
    print(json.dumps({"kept": stats[-1]["stats"]["total"]}))


if __name__ == "__main__":
    main()

"""Tokenization with datatrove's DocumentTokenizer, one task per worker.

Usage: python datatrove_tokenizer.py TOKENIZER_DIRECTORY WORKERS OUTPUT FILE.jsonl.gz...
The files must be all the files of their directory.
"""

import sys
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer


def main() -> None:
    """Read, tokenize and write."""
    tokenizer_directory, workers, output, *files = sys.argv[1:]
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(str(Path(files[0]).parent), text_key="content", glob_pattern="*.jsonl.gz"),
            DocumentTokenizer(
                output_folder=f"{output}/ids",
                tokenizer_name_or_path=str(Path(tokenizer_directory) / "tokenizer.json"),
                eos_token="<|endoftext|>",
                shuffle_documents=False,
            ),
        ],
        tasks=int(workers),
        workers=int(workers),
        logging_dir=f"{output}/logs",
    ).run()


if __name__ == "__main__":
    main()

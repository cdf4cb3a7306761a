"""Random sequences from one flat file of uint16 ids, read as in other projects. Prints JSON.

Usage: python random_sequences.py arrow IDS.bin SEQ_LEN DIRECTORY    save the ids as rows of a dataset
       python random_sequences.py WAY SOURCE SEQ_LEN SEQUENCES SECONDS
WAY: nanogpt or memmap, with IDS.bin as SOURCE; datasets-numpy or datasets-torch, with DIRECTORY as SOURCE.
Each produces int64, as an embedding expects: nanogpt inputs and targets, [sequences, seq_len] each;
memmap [sequences, seq_len + 1]; datasets [sequences, seq_len].
"""

import json
import sys
from collections.abc import Callable

import numpy as np
from rounds import sequences_per_second


def save_arrow(ids_file: str, seq_len: int, directory: str) -> None:
    """Save rows of `seq_len` ids as int32, the type that tokenizer output has in a dataset."""
    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import InMemoryTable

    ids = np.fromfile(ids_file, np.uint16)
    rows = len(ids) // seq_len
    starts = np.arange(rows + 1, dtype=np.int32) * seq_len
    column = pa.ListArray.from_arrays(starts, ids[: rows * seq_len].astype(np.int32))
    Dataset(InMemoryTable(pa.table({"input_ids": column}))).save_to_disk(directory)


def nanogpt(ids_file: str, seq_len: int, sequences: int) -> Callable[[], object]:
    """A new memory map per batch, as in nanoGPT (against a leak in old numpy); rows widened, then stacked."""
    import torch

    def take() -> object:
        ids = np.memmap(ids_file, dtype=np.uint16, mode="r")
        starts = torch.randint(len(ids) - seq_len, (sequences,)).tolist()
        inputs = [torch.from_numpy(ids[start : start + seq_len].astype(np.int64)) for start in starts]
        targets = [torch.from_numpy(ids[start + 1 : start + 1 + seq_len].astype(np.int64)) for start in starts]
        return torch.stack(inputs), torch.stack(targets)

    return take


def memmap(ids_file: str, seq_len: int, sequences: int) -> Callable[[], object]:
    """One memory map; rows stacked, then widened."""
    ids = np.memmap(ids_file, dtype=np.uint16, mode="r")
    rng = np.random.default_rng(0)

    def take() -> object:
        numbers = rng.integers(0, (len(ids) - 1) // seq_len, sequences)
        return np.stack([ids[i * seq_len : (i + 1) * seq_len + 1] for i in numbers.tolist()]).astype(np.int64)

    return take


def datasets(directory: str, sequences: int, form: str) -> Callable[[], object]:
    """Rows of a saved dataset selected by a list of indices, in numpy or torch format."""
    from datasets import load_from_disk

    rows = load_from_disk(directory).with_format(form)
    rng = np.random.default_rng(0)

    def take() -> object:
        batch = rows[rng.integers(0, len(rows), sequences).tolist()]["input_ids"]
        return batch.astype(np.int64) if form == "numpy" else batch.long()

    return take


def main() -> None:
    """Prepare the dataset, or measure."""
    way, source, seq_len, *arguments = sys.argv[1:]
    if way == "arrow":
        save_arrow(source, int(seq_len), arguments[0])
        return
    sequences, seconds = int(arguments[0]), float(arguments[1])
    if way.startswith("datasets-"):
        take = datasets(source, sequences, way.removeprefix("datasets-"))
    else:
        take = {"nanogpt": nanogpt, "memmap": memmap}[way](source, int(seq_len), sequences)
    print(json.dumps({"sequences_per_second": sequences_per_second(take, sequences, seconds)}))


if __name__ == "__main__":
    main()

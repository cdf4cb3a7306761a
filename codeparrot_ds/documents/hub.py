"""Datasets streamed from the Hugging Face Hub."""

from typing import Any

from codeparrot_ds.errors import DataError


def open_hub_dataset(address: str) -> Any:
    """The `datasets.IterableDataset` of "hub:NAME", "hub:NAME?split=train&config=C&revision=R". Raises DataError.

    NAME is a dataset of the Hub, or a local directory that `datasets` understands. No code of the dataset is run.
    """
    from urllib.parse import parse_qsl

    from datasets import load_dataset

    name, _, query = address.removeprefix("hub:").partition("?")
    options = dict(parse_qsl(query))
    unknown = sorted(set(options) - {"split", "config", "revision"})
    if unknown:
        raise DataError(f"{address}: unknown option {unknown[0]!r}; split, config and revision are known.")
    try:
        return load_dataset(
            name,
            options.get("config"),
            split=options.get("split", "train"),
            revision=options.get("revision"),
            streaming=True,
        )
    except Exception as error:  # datasets raises errors of many libraries for one fact: it cannot be opened
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{address}: this dataset cannot be opened ({type(error).__name__}: {reason}). Check its name, split and "
            "configuration, the network, and for a private one `hf auth login`."
        ) from error

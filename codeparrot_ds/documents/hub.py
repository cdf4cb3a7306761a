"""Stream datasets from the Hugging Face Hub."""

from typing import Any

from codeparrot_ds.errors import DataError


def open_hub_dataset(address: str) -> Any:
    """Open "hub:NAME" or "hub:NAME?split=train&config=C&revision=R" as a `datasets.IterableDataset`.

    NAME is a dataset on the Hub, or a local directory that `datasets` can load. Dataset scripts are never executed.
    Raises DataError.
    """
    from urllib.parse import parse_qsl

    from datasets import load_dataset

    name, _, query = address.removeprefix("hub:").partition("?")
    options = dict(parse_qsl(query))
    unknown = sorted(set(options) - {"split", "config", "revision"})
    if unknown:
        raise DataError(f"{address}: unknown option {unknown[0]!r}; use split, config or revision.")
    try:
        return load_dataset(
            name,
            options.get("config"),
            split=options.get("split", "train"),
            revision=options.get("revision"),
            streaming=True,
        )
    except Exception as error:  # datasets raises exceptions of many libraries when a dataset cannot be opened
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{address}: this dataset cannot be opened ({type(error).__name__}: {reason}). Check its name, split and "
            "configuration, and the network. A private dataset needs `hf auth login`."
        ) from error

"""codeparrot-ds: from folders of source code to a trained GPT-2 code model, with every step verified.

The stages, in the order of the data flow: corpus, tokenizer, shards, training, export, evaluation.
docs/reading-the-code.md is a guided tour. For scripts, the names below; docs/api.md shows how.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "Dataset",
    "Recipe",
    "build_model",
    "complete",
    "convert",
    "load_model",
    "load_recipe",
    "open_shards",
    "sequences_of_step",
    "validation_loss",
]

if TYPE_CHECKING:
    from codeparrot_ds.api import (
        Dataset,
        Recipe,
        build_model,
        complete,
        convert,
        load_model,
        load_recipe,
        open_shards,
        sequences_of_step,
        validation_loss,
    )
else:  # imported on first use, because every command imports this module

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from codeparrot_ds import api

        return getattr(api, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})

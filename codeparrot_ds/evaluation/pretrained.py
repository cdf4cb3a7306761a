"""Load a Hugging Face directory for evaluation, from local files only and without running code from it."""

from pathlib import Path
from typing import Any

import torch

from codeparrot_ds.errors import DataError
from codeparrot_ds.system.libraries import require_transformers


def load_pretrained(directory: Path) -> tuple[Any, Any, torch.device]:
    """Return (model in evaluation mode, tokenizer, device) of a converted model. Raises UserError."""
    import transformers
    from safetensors import SafetensorError

    if not (directory / "config.json").is_file():
        raise DataError(f"{directory}: no Hugging Face model here. Create one with `codeparrot-ds convert`.")
    require_transformers()
    transformers.utils.logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{directory}: cannot be loaded ({str(error).splitlines()[0]}). Convert it again.") from None
    return model.to(device).eval(), tokenizer, device

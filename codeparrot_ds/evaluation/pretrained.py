"""Find and load a model to evaluate: a run, a Hugging Face directory or a repository of the Hub. Runs no code of it."""

import os
import re
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from codeparrot_ds.errors import ConfigError, DataError, list_problems
from codeparrot_ds.run.directory import RunDirectory, step_of
from codeparrot_ds.system.jobs import say
from codeparrot_ds.system.libraries import require_transformers
from codeparrot_ds.tokenizer.directory import TOKENIZER_FILE, configured_end_token
from codeparrot_ds.tokenizer.encode import Encoder
from codeparrot_ds.tokenizer.lossless import require_lossless

_HUB_NAME = re.compile(r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
_FILES = ("*.json", "*.txt", "*.model")  # of a repository, beside the weights
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # the first kind that a repository has is downloaded
_SAFELY = {"local_files_only": True, "trust_remote_code": False}
_SMALL_PARAMETERS = 50_000_000
_PROBE, _SAME = 8, 1e-5  # tokens; share of the largest logit, below which a difference is rounding


@dataclass(frozen=True)
class Pretrained:
    """A causal language model in evaluation mode, with its tokenizer.

    Attributes:
        name: what was loaded, for messages and receipts: a directory, or OWNER/NAME@COMMIT of the Hub.
        directory: its files.
        model: a `transformers.PreTrainedModel`.
        device: of the model.
        text_changes: changes of a text that the tokenizer makes (see `tokenizer.parts.accepted_changes`).
    """

    name: str
    directory: Path
    model: Any
    device: torch.device
    encoder: Encoder
    text_changes: list[str]

    @property
    def context(self) -> int | None:
        """Maximum number of tokens in a sequence; None if the model states none."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Ids that end a text: the tokenizer's end token, and those of the generation config."""
        stated = getattr(self.model.generation_config, "eos_token_id", None)
        return frozenset([self.encoder.eos_id, *(stated if isinstance(stated, list) else [stated])]) - {None}


def find_model(name: str | Path) -> tuple[str, Path]:
    """The model that a user names, and the directory of its files.

    Args:
        name: a run (its newest export), a Hugging Face directory, or OWNER/NAME[@REVISION] on the Hub, which is
            downloaded unless it is in the cache.

    Raises:
        DataError: there is no such model, or it cannot be downloaded.
    """
    path = Path(name)
    if (path / "config.json").is_file():
        return str(name), path
    run = RunDirectory(path)
    if run.checkpoints.is_dir() or run.recipe.is_file():
        export, step = run.newest_export()
        newest = max((step_of(each) for each in run.checkpoint_directories()), default=step)
        later = f"; the newest checkpoint is of step {newest:,}" if newest > step else ""
        say(f"note: using {export}, the run's newest converted model (step {step:,}{later})")
        return str(export), export
    match = _HUB_NAME.fullmatch(str(name))
    if path.exists() or match is None:
        raise DataError(f"{name}: no Hugging Face model here. Create one with `codeparrot-ds convert`.")
    return _download(match["repo"], match["revision"])


def _download(repo: str, revision: str | None) -> tuple[str, Path]:
    from fnmatch import fnmatch

    from huggingface_hub import HfApi, constants, snapshot_download

    try:
        # Offline, a snapshot in the cache is used as it is.
        files = [] if constants.HF_HUB_OFFLINE else HfApi().model_info(repo, revision=revision).siblings or []
        there = [pattern for pattern in _WEIGHTS if any(fnmatch(file.rfilename, pattern) for file in files)]
        found = Path(snapshot_download(repo, revision=revision, allow_patterns=[*_FILES, *there[:1]]))
    except Exception as error:  # of the libraries that the Hub's uses, when there is no repository or no network
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{repo}: no such run or directory, and not available from the Hugging Face Hub ({reason}). Correct the "
            "path; for a private repository run `hf auth login`."
        ) from None
    return f"{repo}@{found.name}", found


def load_pretrained(name: str | Path, *, fp32: bool = True) -> Pretrained:
    """Load a model that `find_model` finds, onto the GPU if there is one.

    Args:
        name: see `find_model`.
        fp32: compute in fp32. Otherwise a GPU uses the type of the weights.

    Raises:
        DataError: the model cannot be loaded, is not a causal language model, or lacks weights; or its tokenizer
            loses text.
    """
    import transformers

    label, directory = find_model(name)
    require_transformers()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # what it warns of is checked below
    encoder = _load_encoder(directory)
    changes = require_lossless(encoder, directory)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _load_model(directory, torch.float32 if fp32 or device.type == "cpu" else "auto").to(device).eval()
    found = Pretrained(label, directory, model, device, encoder, changes)
    _require_causal(found)
    return found


def _load_model(directory: Path, dtype: Any) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(directory, **_SAFELY)
        if getattr(config, "is_encoder_decoder", False) or type(config) not in AutoModelForCausalLM._model_mapping:
            raise DataError(f"{directory}: {config.model_type} is not a causal language model. Use another model.")
        model, loading = AutoModelForCausalLM.from_pretrained(
            directory, config=config, dtype=dtype, output_loading_info=True, **_SAFELY
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{directory}: cannot be loaded ({reason}). Convert it again, or copy it again.") from None
    if missing := sorted(loading["missing_keys"]):  # transformers would use random weights
        problems = [f"{key} is missing" for key in missing[:5]]
        problems += [f"and {len(missing) - 5} more"] if len(missing) > 5 else []
        raise DataError(list_problems(str(directory), problems, "It is not a causal language model, or incomplete."))
    return model


def _load_encoder(directory: Path) -> Encoder:
    """The tokenizer of a model as its tokenizer.json states it, whichever class its configuration names."""
    if (directory / TOKENIZER_FILE).is_file():
        return Encoder(directory)
    from transformers import AutoTokenizer

    try:
        backend = AutoTokenizer.from_pretrained(directory, **_SAFELY).backend_tokenizer
    except Exception as error:  # exceptions of several libraries, for files of any kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{directory}: has no {TOKENIZER_FILE}, and no other tokenizer loads ({reason}).") from None
    with tempfile.TemporaryDirectory() as made:
        backend.save(f"{made}/{TOKENIZER_FILE}")
        return Encoder(Path(made), configured_end_token(directory))


def _require_causal(found: Pretrained) -> None:
    """Raise DataError if a later token changes an earlier prediction, or the tokenizer has ids the model lacks."""
    rows = found.model.get_input_embeddings().weight.shape[0]
    if found.encoder.vocab_size > rows:
        raise DataError(
            f"{found.name}: the tokenizer has {found.encoder.vocab_size:,} ids, the model {rows:,}. Use the tokenizer "
            "that the model was trained with."
        )
    ids = torch.arange(_PROBE, device=found.device)[None] % rows
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % rows
    with torch.inference_mode():
        here, there = (found.model(input_ids=each).logits[0, :-1].float() for each in (ids, changed))
    if float((here - there).abs().max()) > _SAME * float(here.abs().max()):
        raise DataError(f"{found.name}: sees the tokens that it is to predict, so it is not a causal language model.")


def limit_threads(found: Pretrained) -> None:
    """Generate with a small model on one thread, unless OMP_NUM_THREADS is set.

    A step takes a millisecond: threads that wait for one another on shared cores take 14 times the CPU time.
    """
    small = found.model.num_parameters() < _SMALL_PARAMETERS
    if small and found.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def fit_context(found: Pretrained, length: int, new_tokens: int) -> tuple[int, int]:
    """Tokens of a prompt to keep, from its end, and tokens that may follow.

    The prompt gives way to `new_tokens`, but not below half of the context.

    Args:
        found: the model.
        length: tokens of the prompt.
        new_tokens: tokens wanted.

    Raises:
        ConfigError: the model's context is a single token.
    """
    context = found.context
    if context is None:
        return length, new_tokens
    if context < 2:
        raise ConfigError(f"{found.name}: a context of {context} token leaves no room for a completion.")
    kept = min(length, max(context - new_tokens, context // 2))
    return kept, min(new_tokens, context - kept)

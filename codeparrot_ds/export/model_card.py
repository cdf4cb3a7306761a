"""The model card of a converted model, README.md, which the Hub shows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codeparrot_ds.export.certificate import CERTIFICATE, FOLDED, KEPT, NO_SCALE
from codeparrot_ds.run.directory import Checkpoint, RunDirectory
from codeparrot_ds.run.recipe import load_recipe

# By the certificate's `attention_scale`.
_NOTES = {
    NO_SCALE: "",
    FOLDED: """
The model was trained with `scale_attn_by_inverse_layer_idx`. Here the scale is part of the weights (the query
projection of layer i, from 0, is divided by i + 1), so the setting is off and every runtime for GPT-2 gives the same
result.
""",
    KEPT: """
**Needs transformers 5.4 or newer.** The configuration sets `scale_attn_by_inverse_layer_idx`, which older versions
ignore with their default attention, as do most other runtimes (vLLM, GGUF): the model then runs without an error, but
gives worse results.
""",
}


def write_model_card(
    directory: Path, run: RunDirectory, checkpoints: Sequence[Checkpoint], certificate: dict[str, Any]
) -> None:
    """Write README.md, which the Hub shows."""
    newest, forward = checkpoints[-1], certificate["forward"]
    recipe = load_recipe(run.recipe)
    steps = ", ".join(f"{checkpoint.step:,}" for checkpoint in checkpoints)
    scale = certificate["attention_scale"]
    rows = [
        ("parameters", f"{certificate['parameters']:,}"),
        ("layers, heads, width", f"{recipe.model.n_layer}, {recipe.model.n_head}, {recipe.model.n_embd}"),
        ("vocabulary", f"{recipe.model.vocab_size:,} (byte-level BPE)"),
        ("context", f"{recipe.model.seq_len:,} tokens"),
        ("optimizer steps", steps if len(checkpoints) == 1 else f"the mean of the weights after {steps}"),
        ("tokens seen", f"{newest.samples_seen * recipe.model.seq_len:,}"),
        ("trained in", f"{newest.precision}, ZeRO stage {newest.zero_stage}, {newest.world_size} ranks"),
        ("weights here", certificate["dtype"]),
    ]
    if forward is not None:
        rows.append(
            ("validation loss", f"{forward['loss_written']:.4f} nats per token, {forward['sequences']} sequences")
        )
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    (directory / "README.md").write_text(
        f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- code
- gpt2
- codeparrot-ds
---

# {recipe.name}

A GPT-2 model of source code, trained from scratch with codeparrot-ds.

| | |
|---|---|
{table}

```python
from transformers import pipeline

complete = pipeline("text-generation", "PATH_OR_REPOSITORY")
print(complete("def fibonacci(n):", max_new_tokens=64)[0]["generated_text"])
```
{_NOTES[scale]}
`{CERTIFICATE}` holds the digest of every tensor, that of the fp32 weights in the checkpoint it was converted from, and
the losses of both. `codeparrot-ds convert --check DIRECTORY` verifies these files against it.
""",
        encoding="utf-8",
    )

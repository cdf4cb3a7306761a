"""What finished shards were built from, to notice that a later call wants something else."""

import dataclasses

from codeparrot_ds.errors import DataError
from codeparrot_ds.shards.format import Manifest
from codeparrot_ds.system.files import MANIFEST
from codeparrot_ds.system.inputs_record import Files, require_same_inputs
from codeparrot_ds.system.storage import Directory


def finished_shards(target: Directory, wanted: Manifest, files: Files) -> Manifest | None:
    """The manifest in `target`, or None. Raises DataError when its shards were built with other options or inputs."""
    if not target.exists(MANIFEST):
        return None
    found = Manifest.read(wanted.directory)
    if "text_changes" not in found.options:  # written by a version that did not record what the tokenizer determines
        wanted = dataclasses.replace(wanted, options={k: v for k, v in wanted.options.items() if k != "text_changes"})
    keys = ("tokenizer_digest", "eos_id", "options", "sources")
    differing = [key for key in keys if getattr(found, key) != getattr(wanted, key)]
    if differing:
        raise DataError(
            f"{target}: contains finished shards that were built with different options (differing: "
            f"{', '.join(differing)}). Name another output directory, or remove this one."
        )
    require_same_inputs(target, "shards", files)
    return found

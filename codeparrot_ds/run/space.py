"""Disk space that a run needs for its checkpoints."""

from fractions import Fraction

from codeparrot_ds.run.ds_config import checkpoint_bytes
from codeparrot_ds.run.recipe import Recipe

_MARGIN = 1.08  # for tensor names and shapes in a checkpoint, and for other writers to the disk


def checkpoints_to_come(recipe: Recipe, step: int, published: int) -> int:
    """Number of additional checkpoints that a run needs space for.

    Old checkpoints are removed only after a new one is complete, so at most `keep_last` + 1 exist at a time.

    Args:
        recipe: of the run.
        step: optimizer steps already taken.
        published: number of checkpoints already on disk.
    """
    missing = max(1, recipe.checkpoints.keep_last + 1 - published)
    if recipe.checkpoints.every_minutes is not None:
        return missing
    return min(missing, -(-(recipe.schedule.last_step - step) // recipe.checkpoints.every_steps))


def checkpoint_room_bytes(
    recipe: Recipe,
    zero_stage: int,
    parameters: int,
    checkpoints: int,
    share: Fraction = Fraction(1),
    has_rank_0: bool = True,
) -> int:
    """Disk space (bytes) that `checkpoints` checkpoints need on one disk.

    Args:
        recipe: of the run.
        zero_stage: ZeRO stage, 0 to 3.
        parameters: number of model parameters.
        checkpoints: number of checkpoints; see `checkpoints_to_come`.
        share: fraction of the ranks that write to this disk.
        has_rank_0: whether rank 0, which writes the data that is not partitioned, writes to this disk.
    """
    partitions, of_rank_0 = checkpoint_bytes(parameters, zero_stage, recipe.engine.precision)
    return int(_MARGIN * checkpoints * (int(partitions * share) + of_rank_0 * has_rank_0))

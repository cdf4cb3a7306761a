"""Room on disk that a run needs for its checkpoints."""

from fractions import Fraction

from codeparrot_ds.run.ds_config import checkpoint_bytes
from codeparrot_ds.run.recipe import Recipe

_MARGIN = 1.08  # for what names and shapes add to a checkpoint, and whoever else writes meanwhile


def checkpoints_to_come(recipe: Recipe, step: int, published: int) -> int:
    """Checkpoints that a run needs more room for from `step` on, when `published` are there.

    Old ones are removed only after a new one is complete, so there is one more than are kept.
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
    """Bytes of so many checkpoints on one disk.

    Args:
        recipe: of the run.
        zero_stage: 0 to 3.
        parameters: of the model.
        checkpoints: how many; see `checkpoints_to_come`.
        share: of the ranks that write to this disk.
        has_rank_0: it is one of them, and writes what is not partitioned.
    """
    partitions, of_rank_0 = checkpoint_bytes(parameters, zero_stage, recipe.engine.precision)
    return int(_MARGIN * checkpoints * (int(partitions * share) + of_rank_0 * has_rank_0))

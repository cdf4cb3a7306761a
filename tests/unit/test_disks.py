"""Which checkpoint is complete when every host has a part of it: every file must exist undamaged on some host."""

from pathlib import Path

from codeparrot_ds.run.directory import Checkpoint, RunDirectory
from codeparrot_ds.training import resume

FILES = {name: {"bytes": 1, "xxh3_128": "", "host": f"host-{name[-1]}"} for name in ("part-a", "part-b", "part-c")}


def copy(*good: str, manifest: str = "one", **problems: str) -> "resume._Copy":
    """Contents of a disk."""
    checkpoint = Checkpoint(Path("step-00000003"), 3, 12, 5, 3, 3, "fp32", {}, FILES, None)
    return resume._Copy(
        checkpoint, manifest, frozenset(good), {name.replace("_", "-"): it for name, it in problems.items()}
    )


def test_parts_that_are_complete_together_count() -> None:
    copies = [copy("part-a"), None, copy("part-b"), copy("part-b", "part-c")]
    assert resume._choose(copies) == (copies[0], [])


def test_a_damaged_part_is_used_from_another_disk_or_named() -> None:
    damaged = copy("part-a", "part-c", part_b="part-b: its bytes are not those that were written")
    assert resume._choose([damaged, copy("part-b")])[0] is damaged
    assert resume._choose([damaged]) == (None, ["part-b: its bytes are not those that were written"])


def test_the_host_of_a_missing_part_is_named() -> None:
    chosen, problems = resume._choose([copy("part-a"), copy("part-c")])
    assert chosen is None
    assert problems == ["1 files written by host-b are on none of these hosts, e.g. part-b"]


def test_parts_of_another_attempt_at_the_step_do_not_count() -> None:
    chosen, problems = resume._choose([copy("part-a", "part-b"), copy("part-c", manifest="another")])
    assert chosen is None and len(problems) == 3
    whole = copy("part-a", "part-b", "part-c", manifest="another")
    assert resume._choose([copy("part-a"), copy("part-b"), whole])[0] is whole


def test_a_disk_without_any_manifest_has_nothing() -> None:
    assert resume._choose([None, None]) == (None, ["no readable manifest, so the checkpoint is incomplete"])


def test_a_checkpoint_that_is_being_removed_does_not_count(tmp_path: Path) -> None:
    """A crash during the removal of an old checkpoint leaves its manifest, under a name that is cleaned up later."""
    run = RunDirectory(tmp_path)
    for name in ("step-00000003", "step-00000006.tmp", "step-00000009.removed.tmp", "step-00000012.damaged"):
        (run.checkpoints / name).mkdir(parents=True)
        (run.checkpoints / name / "manifest.json").touch()
    (run.checkpoints / "step-00000015.tmp").mkdir()
    assert run.prepared_steps() == {6}
    assert run.checkpoint_directories() == [run.checkpoint(3)]

"""A killed training of a tokenizer, and one on Ray: the same bytes as of an uninterrupted one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.faults.test_preprocessing import kill, ray_cluster, until
from tests.shard_commands import TIMEOUT, environment, files_of
from tests.tokenizer_kinds import sources

pytest.importorskip("ffbpe")
COMMAND = (sys.executable, "-m", "tests.faults.train_tokenizer")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("input") / "a.jsonl"
    path.write_text("".join(json.dumps({"content": text}) + "\n" for text in sources("asyncio", "email", "json")))
    return path


def run(*arguments: object, **more: str) -> None:
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=ROOT,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def whole(source: Path) -> dict[str, bytes]:
    """The files that one worker makes without interruption."""
    output = source.parent / "whole"
    run(source, output, "workers=1", "documents=50")
    return files_of(output)


def kill_after(command: list[str], work: Path, finished: int, whom: str) -> None:
    """Start a training, and kill it when so many tasks have counted their words."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL, start_new_session=True)
    assert until(lambda: len([*work.glob("*/*.json")]) >= finished or process.poll() is not None, 60)
    assert process.poll() is None and kill(process, whom)
    process.wait(60)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["parent", "worker", "group"])
def test_a_killed_training_goes_on_and_makes_the_same_bytes(
    source: Path, whole: dict[str, bytes], tmp_path: Path, whom: str
) -> None:
    output, work = tmp_path / "tokenizer", tmp_path / ".tokenizer.work"
    command = [*COMMAND, str(source), str(output), "workers=2", "documents=50"]
    for finished in (2, 8):  # of about fifty tasks
        kill_after(command, work, finished, whom)
        assert not output.exists() and len([*work.glob("*/*.json")]) >= finished
    run(source, output, "workers=2", "documents=50")
    assert files_of(output) == whole
    assert not [path.name for path in tmp_path.iterdir() if path != output]


@pytest.mark.slow
def test_ray_makes_the_same_bytes(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    with ray_cluster() as cluster:
        run(source, tmp_path / "tokenizer", 'engine="ray"', "documents=50", **cluster.environment())
    assert files_of(tmp_path / "tokenizer") == whole

"""`codeparrot-ds shards build --hostfile` and `evaluate loss --hostfile` over three real hosts (see conftest.py)."""

import json
import re
import sys
from pathlib import Path

import pytest

from codeparrot_ds.evaluation.loss import validation_loss
from codeparrot_ds.export.convert import convert
from codeparrot_ds.shards.verify import verify
from tests.conftest import ROOT, Launched, Trained
from tests.multinode.conftest import TOOLS_PATH, RealHosts
from tests.shard_commands import Corpus, write_corpus

pytestmark = pytest.mark.slow


@pytest.fixture
def corpus(data: Path, tmp_path: Path) -> Corpus:
    """Eight tasks."""
    return write_corpus(tmp_path / "corpus", data / "tokenizer", 200, 40)


def build_on(real_hosts: RealHosts, corpus: Corpus, output: Path, *options: str, hosts: int = 3) -> Launched:
    """Build shards on the first hosts of the list."""
    hostfile = output.with_suffix(".hosts")
    hostfile.write_text("".join(f"{host} slots=1\n" for host in real_hosts.hosts[:hosts]))
    program = Path(sys.executable).with_name("codeparrot-ds")
    command = [program, "shards", *corpus.command(output, "--workers", "1", "--hostfile", hostfile, *options)]
    environment = {"HOME": str(output.parent), "PATH": f"{Path(sys.executable).parent}:{TOOLS_PATH}"}
    return real_hosts.run(command, timeout=200, env=environment, cwd=ROOT)


def test_three_hosts_make_the_bytes_of_one_even_when_one_is_lost(
    real_hosts: RealHosts, corpus: Corpus, tmp_path: Path
) -> None:
    one = build_on(real_hosts, corpus, tmp_path / "one", hosts=1)
    assert one.returncode == 0, one.output
    with real_hosts.without_sshd(1):
        done = build_on(real_hosts, corpus, tmp_path / "three")
    assert done.returncode == 0, done.output
    assert re.search(rf"{real_hosts.hosts[1]}: slice \d/3 failed with exit code 255", done.output), done.output
    verify(tmp_path / "three", deep=True)
    names = sorted(path.name for path in (tmp_path / "one").iterdir() if path.is_file())
    assert len(names) > 8
    for name in names:
        assert (tmp_path / "three" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


def test_a_user_error_is_reported_and_not_retried_elsewhere(
    real_hosts: RealHosts, corpus: Corpus, tmp_path: Path
) -> None:
    done = build_on(real_hosts, corpus, tmp_path / "shards", "--encoder", "nonsense")
    assert done.returncode == 1
    assert "failed with a user error, see above" in done.output and "Traceback" not in done.output
    assert not (tmp_path / "shards" / "manifest.json").exists()


def test_a_loss_over_three_hosts_is_that_of_one(
    real_hosts: RealHosts, baseline: Trained, data: Path, tmp_path: Path
) -> None:
    model, sequences = tmp_path / "hf", 7  # the third host has fewer than the others
    convert([baseline.run.newest_checkpoint()], model, memory_cap_bytes=8_000_000_000, sequences=0)
    hostfile = tmp_path / "hosts"
    hostfile.write_text("".join(f"{host} slots=1\n" for host in real_hosts.hosts))
    program = Path(sys.executable).with_name("codeparrot-ds")
    command = [program, "evaluate", "loss", model, data / "shards", "--sequences", str(sequences), "--json"]
    environment = {"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "PATH": TOOLS_PATH}
    done = real_hosts.run([*command, "--hostfile", hostfile], timeout=200, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.output
    found = json.loads(done.output[done.output.index("{\n") :])
    expected = json.loads(json.dumps(validation_loss(model, data / "shards", sequences).to_dict()))
    groups = ("by_licence", "by_repository", "by_length")
    for each, wanted in ((found.pop(name), expected.pop(name)) for name in groups):
        assert [group.pop("name") for group in each] == [group.pop("name") for group in wanted]
        for group, its in zip(each, wanted, strict=True):
            missing = [name for name, value in its.items() if value is None]  # the error of a single document
            assert [group.pop(name) for name in missing] == [its.pop(name) for name in missing]
            assert group == pytest.approx(its, rel=1e-6)
    assert found == pytest.approx(expected, rel=1e-6)
    assert (found["sequences"], found["loss_unigram"]) == (sequences, expected["loss_unigram"])


@pytest.mark.nightly
def test_samples_of_three_hosts_are_those_of_one(real_hosts: RealHosts, baseline: Trained, tmp_path: Path) -> None:
    model = tmp_path / "hf"
    convert([baseline.run.newest_checkpoint()], model, memory_cap_bytes=8_000_000_000, sequences=0)
    hostfile = tmp_path / "hosts"
    hostfile.write_text("".join(f"{host} slots=1\n" for host in real_hosts.hosts))
    program = Path(sys.executable).with_name("codeparrot-ds")
    problems = ROOT / "tests" / "small_problems.jsonl"
    command = [program, "evaluate", "humaneval", model, "--problems", problems, "--no-score", "--batch-size", "8"]
    command += ["-n", "2", "--temperature", "0.8", "--max-new-tokens", "12"]
    environment = {"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "PATH": TOOLS_PATH}
    found = []
    for name, more in (("one", []), ("three", ["--hostfile", hostfile])):
        done = real_hosts.run([*command, "-o", tmp_path / name, *more], timeout=400, env=environment, cwd=ROOT)
        assert done.returncode == 0, done.output
        found.append((tmp_path / name / "samples-t0.8.jsonl").read_bytes())
    assert found[0] == found[1]
    assert found[0].count(b"\n") == 40

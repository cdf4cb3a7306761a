"""The hosts of an attempt, the environment they get, and the messages a supervisor receives."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from deepspeed.launcher.multinode_runner import PDSHRunner

from codeparrot_ds.errors import EXIT_CRASHED, EXIT_PREEMPTED, EXIT_USER_ERROR, ClusterError, ConfigError
from codeparrot_ds.hosts import launchers
from codeparrot_ds.hosts.launchers import forwarded
from codeparrot_ds.hosts.lifeline import Lines, Supervisor
from codeparrot_ds.run.directory import RunDirectory
from codeparrot_ds.run.recipe import Recipe
from codeparrot_ds.run.sections import Batch
from codeparrot_ds.supervision import attempt as attempts
from codeparrot_ds.supervision import launch, placement
from codeparrot_ds.supervision.attempt import Attempt, Outcome, Restarts, Stop
from codeparrot_ds.supervision.placement import Hosts, ManyHosts, Start, UnreachableError
from codeparrot_ds.system.launched import rank_of_scheduler

FOUR = "a slots=2\nb slots=2\nc slots=2\nd slots=2\n"


@pytest.fixture
def many_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return the placement on four hosts of two slots, some of them `lost`."""
    monkeypatch.setattr(launchers, "resolve_name", lambda host: "192.0.2.1")
    monkeypatch.setattr(placement, "_address_towards", lambda hosts: "192.0.2.9")
    (tmp_path / "hosts").write_text(FOUR)

    def make(lost: Iterable[str] = (), batch: int = 24, **how: Any) -> Any:
        monkeypatch.setattr(launchers, "find_unreachable", lambda hosts: dict.fromkeys(set(lost) & set(hosts), "gone"))
        recipe = SimpleNamespace(batch=Batch(global_batch_size=batch), run_directory=tmp_path)
        return ManyHosts(Hosts(tmp_path / "hosts", doctor=False, **how), cast(Recipe, recipe))

    return make


def test_spare_hosts_replace_lost_ones(many_hosts: Callable[..., Any], tmp_path: Path) -> None:
    assert many_hosts(spare_hosts=1).prepare(2).slots == {"a": 2, "b": 2, "c": 2}
    assert many_hosts(["b"], spare_hosts=1).prepare(2).slots == {"a": 2, "c": 2, "d": 2}
    assert (tmp_path / "hostfile").read_text() == "a slots=2\nc slots=2\nd slots=2\n"


def test_fewer_hosts_only_if_allowed_and_the_batch_can_be_divided(many_hosts: Callable[..., Any]) -> None:
    with pytest.raises(ClusterError, match="3 of 4 hosts can train, but 4 are needed"):
        many_hosts(["b"]).prepare(2)
    assert many_hosts(["b"], min_hosts=2).prepare(2).slots == {"a": 2, "c": 2, "d": 2}
    assert many_hosts(["b"], min_hosts=2, batch=8).prepare(2).slots == {
        "a": 2,
        "c": 2,
    }  # 8 does not divide evenly over six ranks
    with pytest.raises(ClusterError, match="1 of 4"):
        many_hosts(["a", "b", "c"], min_hosts=2).prepare(2)
    with pytest.raises(ConfigError, match="at least 9 required"):
        many_hosts(min_hosts=9)


class Place:
    """Stands for `ManyHosts`: the first attempt fails, and then hosts do not answer for some checks."""

    def __init__(self, silent: int) -> None:
        self.silent, self.checks = silent, 0

    def prepare(self, number: int) -> Start:
        """See `ManyHosts`."""
        self.checks += number > 1
        if 0 < self.checks <= self.silent:
            raise UnreachableError("1 of 2 hosts can train, but 2 are needed (b: gone).")
        program = ["false" if number == 1 else "true"]
        return Start(program, {}, "127.0.0.1", {"a": 1}, lambda: "", lambda host, pids: None)

    def lost(self, host: str | None, in_a_row: int) -> None:
        """See `ManyHosts`."""


@pytest.mark.parametrize(("wait", "checks"), [(60.0, 5), (0.0, 1)])
def test_a_restart_waits_for_hosts_that_do_not_answer(
    wait: float,
    checks: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a limit of its own: the restart that is allowed is left for a crash."""
    monkeypatch.setattr(launch, "_BETWEEN_CHECKS_SECONDS", 0.0)
    place: Any = Place(4)
    run = RunDirectory(tmp_path)
    with Stop() as stop:
        code = launch._Job(tmp_path / "r", [], run, place, Restarts(1, 0.0), wait).run(stop)
    said = capsys.readouterr().err
    recorded = [json.loads(line) for line in run.launches.read_text(encoding="utf-8").splitlines()]
    assert place.checks == checks
    if wait:
        assert said.count("Waiting up to 60 s for them (--wait-for-hosts)") == 1
        assert [each["state"] for each in recorded] == ["failed", "failed"]  # `true` starts no rank
        assert code == EXIT_CRASHED
    else:
        assert "error: 1 of 2 hosts can train" in said and "Waited 0 s for them" in said
        assert [each["state"] for each in recorded] == ["failed", "unreachable"]
        assert code == EXIT_USER_ERROR


def test_a_first_start_does_not_wait_for_hosts(tmp_path: Path) -> None:
    """A name in the hostfile may be wrong."""
    place: Any = Place(0)
    place.prepare = lambda number: (_ for _ in ()).throw(UnreachableError("gone"))
    with Stop() as stop, pytest.raises(ClusterError, match="gone"):
        launch._Job(tmp_path / "r", [], RunDirectory(tmp_path), place, Restarts(), 600.0).run(stop)


def test_hosts_that_do_not_answer_are_told_apart_from_unfit_ones(many_hosts: Callable[..., Any]) -> None:
    with pytest.raises(UnreachableError):
        many_hosts(["b"]).prepare(2)
    hosts = many_hosts()
    hosts._unfit = {"a": "its disk is full"}
    with pytest.raises(ClusterError) as refused:
        hosts.prepare(2)
    assert not isinstance(refused.value, UnreachableError)


def test_a_host_that_fails_twice_in_a_row_is_skipped(many_hosts: Callable[..., Any]) -> None:
    hosts = many_hosts(min_hosts=3)
    hosts.lost("b", 1)
    assert hosts.prepare(2).slots == {"a": 2, "b": 2, "c": 2, "d": 2}
    hosts.lost("b", 2)
    assert hosts.prepare(3).slots == {"a": 2, "c": 2, "d": 2}
    hosts = many_hosts()  # requires all of them
    hosts.lost("b", 2)
    assert hosts.prepare(3).slots == {"a": 2, "b": 2, "c": 2, "d": 2}


def test_other_hosts_get_what_ranks_need_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text("# mine\n\nNCCL_DEBUG=INFO\nA = b c\nMY_API_KEY=x\n")
    found = forwarded(
        {
            "PATH": "/bin:/my bin",
            "HF_HOME": "/data/$hf",
            "HF_TOKEN": "hf_x",
            "WANDB_API_KEY": "x",
            "WANDB_PROJECT": "p",
            "EDITOR": "vi",
            "DS_TWO": "1\n2",
        }
    )
    assert found == {
        "PATH": "/bin:/my bin",
        "HF_HOME": "/data/$hf",
        "WANDB_PROJECT": "p",
        "NCCL_DEBUG": "INFO",
        "A": "b c",
    }


@pytest.mark.parametrize(
    "environment",
    [
        {
            "OMPI_COMM_WORLD_SIZE": "4",
            "OMPI_COMM_WORLD_RANK": "3",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        },
        {
            "SLURM_STEP_NUM_TASKS": "4",
            "SLURM_PROCID": "3",
            "SLURM_LOCALID": "1",
            "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        },
    ],
    ids=["mpirun", "srun"],
)
def test_ranks_that_a_scheduler_started_know_one_another(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="a scheduler started 4 ranks"):
        rank_of_scheduler(environment)
    where = {"MASTER_ADDR": "a", "MASTER_PORT": "1"}
    found = rank_of_scheduler({**environment, **where})
    assert found == {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
    assert rank_of_scheduler({**environment, "RANK": "0"}) == {}  # deepspeed's, inside a job
    assert rank_of_scheduler({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}) == {}  # of a batch script, not of a step


def test_restarts_wait_longer_and_longer() -> None:
    restarts = Restarts(9, 5.0)
    assert [restarts.delay_seconds(number) for number in range(1, 9)] == [0, 5, 10, 20, 40, 80, 160, 300]


def test_the_address_of_a_supervisor() -> None:
    assert Supervisor.parse("192.0.2.1:80/ab") == Supervisor("192.0.2.1", 80, "ab")
    assert str(Supervisor.parse("h:1/ab")) == "h:1/ab"
    for bad in ("h:1", "h/ab", ":1/ab", "h:x/ab", "h:1/"):
        with pytest.raises(ValueError):
            Supervisor.parse(bad)


def test_messages_come_in_any_pieces() -> None:
    text = b'{"a": 1}\n{"b": "\xc3\xa9"}\n'
    for size in (1, 3, len(text)):
        lines = Lines()
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        assert [message for piece in pieces for message in lines.feed(piece)] == [{"a": 1}, {"b": "é"}]
    for bad in (b"[1]\n", b"x\n", b"y" * 100_000):
        with pytest.raises(ValueError):
            list(Lines().feed(bad))


# An attempt whose ranks are threads of this test


def attempt(scenario: Callable[[Supervisor], None], hosts: list[str] | None = None) -> tuple[Outcome, float]:
    """Return the outcome and seconds of an attempt whose command only waits for its ranks to exit."""
    watched = Attempt("127.0.0.1", dict.fromkeys(hosts or ["a", "b"], 1), lambda host, pids: None)
    thread = threading.Thread(target=scenario, args=(watched.supervisor,))
    command = [sys.executable, "-c", "import time; time.sleep(3)"]
    thread.start()
    started = time.monotonic()
    with Stop() as stop:
        outcome = watched.run(command, dict(os.environ), stop, lambda: "")
    thread.join()
    return outcome, time.monotonic() - started


def rank(supervisor: Supervisor, number: int, **more: Any) -> socket.socket:
    """A rank that has identified itself."""
    connection = socket.create_connection((supervisor.host, supervisor.port))
    hello = {"job": supervisor.job, "rank": number, "node": number, "host": "me", "pid": 1 << 22, **more}
    connection.sendall(json.dumps(hello).encode() + b"\n")
    return connection


def ends(connection: socket.socket, code: int, error: str = "") -> None:
    """Exit on its own."""
    connection.sendall(json.dumps({"end": code, "error": error}).encode() + b"\n")
    connection.close()


@pytest.mark.parametrize(
    ("codes", "state", "code", "reason"),
    [
        ([0, 0], "finished", 0, "trained to its last step"),
        ([EXIT_PREEMPTED, EXIT_PREEMPTED], "preempted", EXIT_PREEMPTED, "asked to stop"),
        ([EXIT_USER_ERROR, EXIT_USER_ERROR], "refused", EXIT_USER_ERROR, "rank 0 on a: because"),
        ([EXIT_CRASHED, EXIT_CRASHED], "failed", EXIT_CRASHED, "rank 0 on a because"),
    ],
)
def test_the_outcome_is_what_the_ranks_report(codes: list[int], state: str, code: int, reason: str) -> None:
    def scenario(supervisor: Supervisor) -> None:
        ranks = [rank(supervisor, number) for number in (0, 1)]
        for connection, each in zip(ranks, codes, strict=True):
            ends(connection, each, "because")
            time.sleep(0.3)

    outcome, _ = attempt(scenario)
    assert (outcome.state, outcome.code, outcome.reason) == (state, code, reason)


def test_a_rank_that_disconnects_is_named_and_the_others_are_terminated() -> None:
    told = threading.Event()

    def scenario(supervisor: Supervisor) -> None:
        first, second = rank(supervisor, 0), rank(supervisor, 1)
        second.sendall(b'{"doing": "step 7"}\n')
        time.sleep(0.3)
        second.close()
        if first.recv(1) == b"":  # the supervisor has closed its side
            told.set()
        ends(first, EXIT_CRASHED, "its peer is gone")

    outcome, seconds = attempt(scenario)
    assert told.is_set() and seconds < 10
    assert (outcome.state, outcome.host, outcome.doing) == ("failed", "b", "step 7")
    assert outcome.reason == "rank 1 on b was killed, or its host was lost"


def test_a_rank_that_fails_after_all_have_finished_does_not_fail_the_job() -> None:
    for code, state in ((0, "finished"), (EXIT_PREEMPTED, "preempted")):

        def scenario(supervisor: Supervisor, code: int = code) -> None:
            first, second = rank(supervisor, 0), rank(supervisor, 1)
            ends(first, code)
            second.close()  # e.g. killed by the scheduler

        assert attempt(scenario)[0].state == state


def test_a_host_whose_ranks_never_connect_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "_OTHERS_SECONDS", 0.5)

    def scenario(supervisor: Supervisor) -> None:
        first = rank(supervisor, 0)
        assert first.recv(1) == b""
        first.close()

    outcome, _ = attempt(scenario)
    assert (outcome.state, outcome.host) == ("failed", "b")
    assert "not all ranks on b have started" in outcome.reason


@pytest.mark.parametrize(
    "text", ["plain", "a=b c", "{a:0.7,b:0.3}", "$HOME `x` \\", 'he said "no"', "^docker0,lo", "it's; *"]
)
def test_arguments_pass_through_pdsh_unchanged(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quote as DeepSpeed 0.19.8 does for a shell command: `add_export` and `parse_user_args` of its pdsh runner."""
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    ssh = launchers.Ssh("pdsh")
    arguments = SimpleNamespace(user_args=[ssh.quote(text)], launcher_args="")
    runner = PDSHRunner.__new__(PDSHRunner)
    runner.args, runner.exports = arguments, {}
    runner.add_export("VALUE", launchers._escape(text))
    script = f"export VALUE={runner.exports['VALUE']}; printf '%s\\n' {runner.parse_user_args()[0]} \"$VALUE\""
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert said.stdout.splitlines() == [text, text]


def test_connections_from_outside_the_job_are_rejected() -> None:
    def scenario(supervisor: Supervisor) -> None:
        good = rank(supervisor, 0)
        for stranger in (
            rank(supervisor, 1, job="another"),
            rank(supervisor, 1, rank="x"),
            rank(supervisor, 1, pid=None),
        ):
            assert stranger.recv(1) == b""
        with socket.create_connection((supervisor.host, supervisor.port)) as noise:
            noise.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert noise.recv(1) == b""
        ends(good, 0)

    assert attempt(scenario)[0].state == "finished"


def test_a_command_that_starts_no_rank_has_failed() -> None:
    outcome, _ = attempt(lambda supervisor: None)
    assert (outcome.state, outcome.reason) == ("failed", "deepspeed exited with code 0 before any rank had started")


def test_a_rank_ends_when_it_loses_its_supervisor() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    supervisor = Supervisor("127.0.0.1", listener.getsockname()[1], "job")
    program = (
        "import sys, time\nfrom codeparrot_ds.hosts.lifeline import Lifeline, Supervisor\n"
        "Lifeline(Supervisor.parse(sys.argv[1]), 3)\ntime.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(supervisor)], stderr=subprocess.PIPE, text=True)
    connection, _ = listener.accept()
    hello = json.loads(connection.makefile().readline())
    assert (hello["job"], hello["rank"], hello["pid"]) == ("job", 3, process.pid)
    connection.close()
    _, errors = process.communicate(timeout=10)
    assert process.returncode == EXIT_CRASHED
    assert "the supervisor of this job has died" in errors

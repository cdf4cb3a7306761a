"""Skipped steps, loss spikes, stop requests and the watchdog, in one process."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from codeparrot_ds.errors import TrainingError
from codeparrot_ds.hosts.lifeline import Lifeline
from codeparrot_ds.training.guards import SkippedSteps, SpikeDetector, StopRequests, replicas_differ
from codeparrot_ds.training.ranks import Ranks
from tests.unit.conftest import Alone


def test_skipped_steps_are_counted_and_too_many_in_a_row_stop_the_run() -> None:
    skipped = SkippedSteps(most=2, so_far=5)
    assert not skipped.check(10, 5)
    assert [skipped.check(11, 6), skipped.check(12, 7)] == [True, True]
    assert not skipped.check(13, 7)  # one good step in between
    skipped.check(14, 8)
    skipped.check(15, 9)
    with pytest.raises(TrainingError, match="step 16: 3 steps in a row were skipped"):
        skipped.check(16, 10)


def test_a_spike_is_detected_and_excluded_from_the_median() -> None:
    spikes = SpikeDetector(threshold=1.0)
    assert all(spikes.check(3.0 + 0.01 * i) is None for i in range(20))
    assert spikes.check(3.9) is None
    for loss in (5.0, math.nan, math.inf):
        assert spikes.check(loss) == pytest.approx(3.1, abs=0.05)
    assert spikes.check(3.0) is None


def test_the_steep_first_steps_are_no_spike() -> None:
    spikes = SpikeDetector(threshold=1.0)
    assert all(spikes.check(loss) is None for loss in (9.0, 20.0, 9.0, 12.0))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_for_a_stop(tmp_path: Path, alone: Ranks, number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        requests = StopRequests(tmp_path / "stop", alone, Lifeline(None, 0))
        requests.begin_exchange()
        assert requests.finish_exchange() == (False, False, False)
        os.kill(os.getpid(), number)
        requests.begin_exchange(save_now=True)
        assert requests.finish_exchange() == (True, True, False)
        assert requests.reason == number.name
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_a_stop_file_asks_once_and_not_again_at_the_next_start(tmp_path: Path, alone: Ranks) -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        stop_file = tmp_path / "stop"
        requests = StopRequests(stop_file, alone, Lifeline(None, 0))
        stop_file.touch()
        requests.begin_exchange()
        assert requests.finish_exchange() == (True, False, False)
        again = StopRequests(stop_file, alone, Lifeline(None, 0))
        again.begin_exchange()
        assert again.finish_exchange() == (False, False, False)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


HANGS = """
import sys, threading, time
from pathlib import Path
from codeparrot_ds.training.guards import Watchdog
def stuck_in_here():
    if sys.argv[2] == "python":
        time.sleep(60)
    import ctypes
    ctypes.PyDLL(None).sleep(60)  # holds the interpreter's lock, as a defective library would
watchdog = Watchdog(0.3, open(sys.argv[1], "w"), lambda message: Path(sys.argv[1] + ".message").write_text(message))
watchdog.beat("the first step")
stuck_in_here()
"""


@pytest.mark.parametrize("how", ["python", "native"])
def test_a_hang_ends_the_process_and_leaves_every_stack(tmp_path: Path, how: str) -> None:
    stacks = tmp_path / "stacks"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANGS, stacks, how], timeout=50, check=False)
    assert done.returncode not in (0, -signal.SIGKILL)
    assert time.monotonic() - started < 40
    assert "stuck_in_here" in stacks.read_text()
    if how == "python":
        assert "hung during the first step" in (tmp_path / "stacks.message").read_text()


def test_replicas_that_differ_in_a_single_bit_are_found() -> None:
    networks = [torch.nn.Linear(5, 7) for _ in range(3)]
    for network in networks[1:]:
        network.load_state_dict(networks[0].state_dict())

    def differing() -> list[int]:
        digests: list[int] = []

        class Collect(Alone):
            def gather(self, value: int) -> list[int]:
                digests.append(value)
                return digests if len(digests) == len(networks) else [0]

        for network in networks:
            found = replicas_differ(network, Collect(0, 1, 0, torch.device("cpu")))
        return found

    assert differing() == []
    networks[1].weight.data.view(torch.int32)[3, 2] ^= 1
    assert differing() == [1]

"""The model of traffic and time on many GPUs agrees with published properties of ZeRO."""

import pytest

from codeparrot_ds.planning.scaling import Cluster, Traffic, step_time, traffic
from codeparrot_ds.run.sections import Model

XL = Model(vocab_size=32_768, n_layer=48, n_head=25, n_embd=1600)


def test_an_all_reduce_sends_twice_and_zero_3_half_as_much_again() -> None:
    """ZeRO (Rajbhandari et al., 2020), section 7: 2 times the parameters without ZeRO, 3 times at stage 3."""
    whole = 2 * XL.parameters
    sent = {stage: traffic(XL, stage, accumulation=1).link_bytes(10**9) for stage in (0, 1, 2, 3)}
    assert sent[0] == pytest.approx(2 * whole)
    assert sent[3] == pytest.approx(3 * whole)
    assert sent[1] == pytest.approx(3 * whole)  # DeepSpeed 0.19.8 all-reduces whole gradients, then gathers weights


def test_accumulation_is_free_only_where_nothing_is_partitioned_but_the_optimizer() -> None:
    one, four = ([traffic(XL, stage, accumulation).link_bytes(8) for stage in (1, 2, 3)] for accumulation in (1, 4))
    assert four[0] == one[0]
    assert four[1] > 2 * one[1]
    assert four[2] == 4 * one[2]


def test_the_slowest_link_decides_and_one_gpu_sends_nothing() -> None:
    sent = Traffic(6e9, 3e9, 0)
    alone = step_time(XL, sent, Cluster(1, 1.0), 1024)
    assert alone.no_overlap_seconds == alone.overlap_seconds == alone.compute_seconds
    one_host = step_time(XL, sent, Cluster(8, 1e9, gpu_bytes_per_second=100e9), 1024)
    two_hosts = step_time(XL, sent, Cluster(16, 1e9, gpu_bytes_per_second=100e9), 1024)
    assert one_host.communication_seconds == pytest.approx(9e9 * 7 / 8 / 100e9)
    assert two_hosts.communication_seconds == pytest.approx(9e9 * 15 / 16 / 1e9)
    assert two_hosts.no_overlap_seconds == two_hosts.compute_seconds + two_hosts.communication_seconds


def test_compute_follows_mfu_and_recomputing_costs_a_third() -> None:
    cluster = Cluster(1, 1.0, gpu_flops=1e15, mfu=0.5)
    plain = step_time(XL, Traffic(0, 0, 0), cluster, 1024).compute_seconds
    assert plain == pytest.approx(1024 * XL.flops_per_token / 0.5e15)
    assert step_time(XL, Traffic(0, 0, 0), cluster, 1024, recomputed=1.0).compute_seconds == pytest.approx(
        plain * 4 / 3
    )

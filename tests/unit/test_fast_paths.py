"""The fast paths of the GPU step, tested without a GPU: no mask, no host waits, one graph, the same losses."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (the customary name)

from codeparrot_ds.run.sections import Model
from codeparrot_ds.training import attention, kernels
from codeparrot_ds.training.loss import LossHead
from codeparrot_ds.training.model import build_model, compile_blocks, next_token_loss
from tests.counting import Counter

SHAPE = {"vocab_size": 300, "seq_len": 32, "n_layer": 4, "n_head": 2, "n_embd": 32}
BLOCKS = SHAPE["n_layer"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    """Reset compilation, so that each test counts its own graphs."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(recompute: str = "none", by_layer: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    """A network in training mode with per-layer attention scale."""
    keys = {"scale_attn_by_inverse_layer_idx": by_layer, "activation_checkpointing": recompute}
    return build_model(Model.model_validate({**SHAPE, **keys}), eos_id=0, seed=3).to(dtype).train()


def batch(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """ids and targets, [2, seq_len]."""
    ids = torch.randint(SHAPE["vocab_size"], (2, SHAPE["seq_len"] + 1), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1].to(device), ids[:, 1:].to(device)


def loss_and_gradients(network: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one micro-batch."""
    network.zero_grad()
    loss = network(*batch()[:1], targets=batch()[1])
    loss.backward()
    return loss.detach(), {name: each.grad.clone() for name, each in network.named_parameters()}


def apart(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest relative error of a gradient, ||found - wanted|| / ||wanted||."""
    return max(float((found[n].double() - w.double()).norm() / w.double().norm()) for n, w in wanted.items())


class Graphs(list[torch.fx.GraphModule]):
    """A torch.compile backend that records its graphs and runs them unchanged."""

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        self.append(graph)
        return graph.forward

    def attention_arguments(self) -> list[dict[str, Any]]:
        """Keyword arguments of every SDPA call in the graphs, and its fourth positional argument, the mask."""
        nodes = [node for graph in self for node in graph.graph.nodes]
        calls = [node for node in nodes if node.target is F.scaled_dot_product_attention]
        return [{"attn_mask": (*node.args, *[None] * 4)[3], **node.kwargs} for node in calls]


def test_attention_gets_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    network, calls, plain = build(), list[Any](), F.scaled_dot_product_attention

    def spy(*tensors: torch.Tensor, **named: Any) -> torch.Tensor:
        calls.append((len(tensors), named))
        result: torch.Tensor = plain(*tensors, **named)
        return result

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    network(*batch()[:1], targets=batch()[1])
    assert len(calls) == BLOCKS
    for number, (tensors, named) in enumerate(calls, start=1):
        assert tensors == 3
        assert named.get("attn_mask") is None
        assert named["is_causal"] is True
        assert named["scale"] == pytest.approx((SHAPE["n_embd"] // SHAPE["n_head"]) ** -0.5 / number)


@pytest.mark.parametrize("by_layer", [True, False])
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_all_blocks_are_one_graph_without_a_mask(recompute: str, by_layer: bool) -> None:
    network, graphs = build(recompute, by_layer), Graphs()
    compile_blocks(network, CPU, graphs)
    loss_and_gradients(network)
    assert len(graphs) == (2 if recompute == "selective" else 1)
    if recompute == "none":  # otherwise SDPA is in a nested graph
        (found,) = graphs.attention_arguments()
        assert found["attn_mask"] is None
        assert found["is_causal"] is True
    loss_and_gradients(network)
    assert len(graphs) == (2 if recompute == "selective" else 1)


def test_a_scale_that_is_a_number_makes_a_graph_for_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "share_scale", lambda network, device: None)
    network, graphs = build(), Graphs()
    compile_blocks(network, CPU, graphs)
    loss_and_gradients(network)
    assert len(graphs) == BLOCKS


def test_a_mask_is_refused_rather_than_ignored() -> None:
    network = build()
    with pytest.raises(ValueError, match="no attention mask"):
        network(batch()[0], attention_mask=torch.ones(2, SHAPE["seq_len"]))
    with pytest.raises(ValueError, match="key-value cache"):
        network.generate(batch()[0][:1, :4], max_new_tokens=2, use_cache=True, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_compiled_blocks_change_no_loss_and_no_gradient(recompute: str) -> None:
    plain = loss_and_gradients(build())
    network = build(recompute)
    compile_blocks(network, CPU, "aot_eager")
    loss, gradients = loss_and_gradients(network)
    assert float(abs(loss / plain[0] - 1)) <= 1e-6
    assert apart(gradients, plain[1]) <= 1e-6


def test_the_scale_of_a_layer_is_not_rounded_to_bf16() -> None:
    network = build()
    compile_blocks(network, CPU, "aot_eager")
    network.to(torch.bfloat16)
    assert network.transformer.h[2].attn.query_scale.item() == pytest.approx(1 / 3, rel=1e-7)
    exact = loss_and_gradients(build())[1]
    compiled, plain = loss_and_gradients(network)[1], loss_and_gradients(build(dtype=torch.bfloat16))[1]
    # Each way to compute has its own rounding errors: as far from fp32 as the plain one, within a tenth.
    assert apart(compiled, exact) <= 1.1 * apart(plain, exact)


def test_nothing_of_a_micro_batch_needs_a_number_on_the_host() -> None:
    network = build().to("meta")  # the meta device has no values: reading one fails
    network(*batch("meta")[:1], targets=batch("meta")[1]).backward()
    with Counter() as counter:
        loss_and_gradients(build())
    assert counter.host_reads == []


def test_a_host_wait_in_a_micro_batch_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = attention.causal_attention

    def curious(module: Any, query: torch.Tensor, *others: Any, **named: Any) -> Any:
        assert bool((query == query).all())
        return plain(module, query, *others, **named)

    monkeypatch.setattr(attention, "causal_attention", curious)
    network = build().to("meta")
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        network(*batch("meta")[:1], targets=batch("meta")[1])
    with Counter() as counter:
        loss_and_gradients(build())
    assert len(counter.host_reads) == BLOCKS


def head_of(chunk: int, fused: bool, dtype: torch.dtype) -> LossHead:
    """A head of 48 ids."""
    head = LossHead(16, 48, bias=False)
    head.weight.data = torch.randn(48, 16, generator=torch.Generator().manual_seed(5))
    head.chunk_tokens, head.fused = chunk, fused
    return head.to(dtype)


@pytest.mark.parametrize("chunk", [64, 7])
def test_the_fused_loss_is_the_loss(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    # As on a GPU except for the compiler, whose C++ takes seconds: the graph is run unchanged.
    eager = torch.compile(kernels._loss_and_gradient, fullgraph=True, backend="eager")
    monkeypatch.setattr(kernels, "_compiled", lambda: eager)
    check_fused_loss(chunk)


@pytest.mark.slow
def test_the_compiled_loss_is_the_loss() -> None:
    check_fused_loss(chunk=7)


def check_fused_loss(chunk: int) -> None:
    """Compare loss and gradients with those of all logits at once, in fp32 and in bf16."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 20, 16, generator=generator)
    targets = torch.randint(0, 48, (2, 20), generator=generator)

    def run(fused: bool, dtype: torch.dtype) -> tuple[float, dict[str, torch.Tensor]]:
        head, given = head_of(chunk, fused, dtype), hidden.to(dtype, copy=True).requires_grad_()
        loss = head(given, targets)
        loss.backward()
        assert given.grad is not None
        assert head.weight.grad is not None
        return loss.item(), {"hidden": given.grad, "weight": head.weight.grad}

    whole, given = head_of(64, False, torch.float32), hidden.clone().requires_grad_()
    exact = next_token_loss(whole(given), targets)
    exact.backward()
    assert given.grad is not None
    assert whole.weight.grad is not None
    wanted = {"hidden": given.grad, "weight": whole.weight.grad}
    loss, gradients = run(True, torch.float32)
    assert abs(loss / exact.item() - 1) <= 1e-6
    assert apart(gradients, wanted) <= 1e-6
    (in_kernel, of_kernel), (in_passes, of_passes) = (run(fused, torch.bfloat16) for fused in (True, False))
    assert abs(in_kernel - exact.item()) <= abs(in_passes - exact.item()) + 1e-6
    assert apart(of_kernel, wanted) <= 1.01 * apart(of_passes, wanted)
    with torch.no_grad():
        assert head_of(chunk, True, torch.float32)(hidden, targets).item() == pytest.approx(exact.item(), rel=1e-6)


def test_the_compiler_is_given_the_logits_once_and_keeps_nothing_of_their_size() -> None:
    """The kernel reads logits twice, for the sum and the gradient, and writes the gradient: 6 bytes per logit in bf16.

    The adjacent matrix products write the logits once and read their gradient twice: 12 bytes in all.
    """
    graphs = Graphs()
    compiled = torch.compile(kernels._loss_and_gradient, fullgraph=True, backend=graphs)
    logits, targets = torch.randn(24, 300, dtype=torch.bfloat16), torch.randint(0, 300, (24, 1))
    loss, gradient = compiled(logits, targets, True)
    (graph,) = graphs
    inputs = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
    assert [each.dtype for each in inputs if each.numel() == logits.numel()] == [torch.bfloat16]
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    results = [node.meta["example_value"] for node in output.args[0]]
    assert [each.dtype for each in results if each.numel() == logits.numel()] == [torch.bfloat16]
    assert (loss.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)


def test_operators_go_over_the_logits_three_times_as_often() -> None:
    head = head_of(4096, False, torch.bfloat16)
    tokens = 64
    with Counter() as counter:
        head(torch.randn(1, tokens, 16).bfloat16().requires_grad_(), torch.zeros(1, tokens, dtype=torch.long))
    assert counter.traffic_bytes / (tokens * 48) > 30

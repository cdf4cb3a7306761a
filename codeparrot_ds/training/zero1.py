"""DeepSpeed's engine with a custom optimizer step for ZeRO-1 in bf16.

On one rank the step moves 48 bytes of memory per parameter, compared with 96 in DeepSpeed 0.19.8, and it does not
synchronize with the device. Unlike DeepSpeed it does not round fp32 gradients to bf16 and back to reduce them over a
single rank, convert bf16 gradients to fp32 before accumulating them, rewrite fp32 gradients to clip them, zero them
twice, or read their norm on the host to decide on clipping and skipping. State, checkpoints and results are the same as
DeepSpeed's.
"""

from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import nvtx

_EPSILON = 1e-6  # added to the norm, as in DeepSpeed


class LeanBF16Optimizer(BF16_Optimizer):
    """AdamW with fp32 gradients and fp32 master weights; each rank updates its partition of the bf16 weights.

    Attributes:
        skipped: [] fp32 on the device, number of steps skipped so far because of non-finite gradients.
    """

    def __init__(self, optimizer: torch.optim.AdamW, *arguments: Any, **named: Any) -> None:
        super().__init__(optimizer, *arguments, **named)
        self.skipped = torch.zeros((), device=self.fp32_groups_flat_partition[0].device)

    @torch.no_grad()
    def _update_hp_grad(self, lp: Any, group_idx: int, param_idx: int, clear_lp_grads: bool) -> None:
        """Accumulate a weight's bf16 gradient into its fp32 gradient in one pass; the first of a step overwrites it."""
        if lp.grad is None:
            return
        gradient, seen = self.fp32_groups_gradients[group_idx][param_idx], self.fp32_groups_has_gradients[group_idx]
        if seen[param_idx]:
            gradient.view_as(lp.grad).add_(lp.grad)
        else:
            gradient.view_as(lp.grad).copy_(lp.grad)
        lp._hp_grad, seen[param_idx] = gradient, True
        if clear_lp_grads:
            lp.grad.zero_()

    def clear_hp_grads(self) -> None:
        """Mark the gradients as stale. They are not zeroed: the first ones of the next step overwrite them."""
        for gradients, seen in zip(self.fp32_groups_gradients, self.fp32_groups_has_gradients, strict=True):
            seen[:] = [False] * len(gradients)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Clip gradients and update the fp32 and bf16 weights, unless a gradient is not finite.

        It does not synchronize with the device: torch's fused AdamW reads the clipping factor and whether to skip the
        step from tensors.
        """
        gradients = []
        for of_group, seen in zip(self.fp32_groups_gradients, self.fp32_groups_has_gradients, strict=True):
            for gradient, is_new in zip(of_group, seen, strict=True):
                if not is_new:  # left over from an earlier step
                    gradient.zero_()
                gradients.append(gradient)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        self._global_grad_norm = norm
        skip = (~torch.isfinite(norm)).float()
        self.skipped += skip
        optimizer = self.optimizer
        optimizer.grad_scale = ((norm + _EPSILON) / self.clip_grad).clamp(min=1.0) if self.clip_grad > 0 else None
        optimizer.found_inf = skip
        for weights, gradient in zip(
            self.fp32_groups_flat_partition, self.fp32_groups_gradient_flat_partition, strict=True
        ):
            weights.grad = gradient
        optimizer.step()
        self._lazy_init_hp_params_optimizer_state()
        self.update_lp_params()
        self.clear_hp_grads()


class Engine(DeepSpeedEngine):
    """DeepSpeed's engine, using `LeanBF16Optimizer` at ZeRO-1 in bf16."""

    def _configure_bf16_optimizer(self, optimizer: torch.optim.AdamW) -> LeanBF16Optimizer:
        return LeanBF16Optimizer(
            optimizer,
            self.param_names,
            bfloat16_config=self._config.bfloat16_config,
            clip_grad=self.gradient_clipping(),
            allgather_bucket_size=self.zero_allgather_bucket_size(),
            dp_process_group=self.seq_data_parallel_group,
            grad_acc_dtype=self.get_data_types()[1],
        )

    def buffered_allreduce_fallback(self, grads: Any = None, elements_per_buffer: int = 500_000_000) -> None:
        """Average gradients over ranks in place, one bucket at a time, in `communication_data_type`."""
        config = self._config
        usual = not config.prescale_gradients and config.gradient_predivide_factor == 1.0 and self.gradient_average
        if grads is not None or not usual or not isinstance(self.optimizer, LeanBF16Optimizer):
            super().buffered_allreduce_fallback(grads, elements_per_buffer)
            return
        group = self.seq_data_parallel_group
        ranks = dist.get_world_size(group)
        if ranks == 1:
            return
        for gradients in self.optimizer.fp32_groups_gradients_flat:
            for bucket in gradients.split(int(config.zero_config.reduce_bucket_size)):
                reduced = bucket.to(self.communication_data_type)
                dist.all_reduce(reduced, group=group)
                reduced.mul_(1 / ranks)
                if reduced is not bucket:
                    bucket.copy_(reduced)

    def _take_model_step(self, lr_kwargs: Any) -> None:
        """Skip the step at stage 0 too if its gradients are not finite; from stage 1 on, DeepSpeed does so itself."""
        if self.zero_optimization_stage() == 0 and not self._gradients_are_finite():
            self.zero_grad()
            self.skipped_steps += 1
            self.global_steps += 1
            self.global_samples += self.train_batch_size()
            return
        super()._take_model_step(lr_kwargs)

    def _gradients_are_finite(self) -> bool:
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        return bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients)))

    # DeepSpeed counts skipped steps in an int. Ours are counted on the device and added when the count is read.
    @property
    def skipped_steps(self) -> int:
        """Steps skipped so far because of non-finite gradients. Waits for the device, unlike `skipped_so_far`."""
        return self._skipped_steps + int(self._skipped_on_device)

    @skipped_steps.setter
    def skipped_steps(self, count: int) -> None:
        """Set the count, as DeepSpeed does when it loads a checkpoint."""
        self._skipped_steps = count
        if isinstance(self._skipped_on_device, torch.Tensor):
            self._skipped_on_device.zero_()

    @property
    def _skipped_on_device(self) -> torch.Tensor | int:
        optimizer = self.__dict__.get("optimizer")
        return optimizer.skipped if isinstance(optimizer, LeanBF16Optimizer) else 0

    def skipped_so_far(self) -> torch.Tensor | int:
        """Return a copy of `skipped_steps` without synchronizing; a tensor if steps are counted on the device."""
        return self._skipped_steps + self._skipped_on_device


def initialize(network: torch.nn.Module, optimizer: Any, ds_config: Mapping[str, Any]) -> Engine:
    """Equivalent of `deepspeed.initialize` for a network and an optimizer, with our engine."""
    nvtx.enable_nvtx = False  # two ranges per hook cost host time at ZeRO-3
    deepspeed.zero.partition_parameters.shutdown_init_context()
    try:
        return Engine(
            args=None,
            model=network,
            optimizer=optimizer,
            dist_init_required=False,
            config=dict(ds_config),
            config_class=DeepSpeedConfig(dict(ds_config)),
        )
    finally:
        deepspeed.zero.partition_parameters.restore_init_context()

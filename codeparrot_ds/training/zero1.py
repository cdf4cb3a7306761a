"""DeepSpeed's engine, with an optimizer step of our own for ZeRO-1 under bf16: 48 bytes of memory traffic a parameter
where DeepSpeed 0.19.8 has 96 (on one rank), and no wait for the device.

What DeepSpeed does and this does not: round fp32 gradients to bf16 and back to reduce them over a single rank, convert
bf16 gradients to fp32 before they are added, write fp32 gradients again to clip them, set them to zero twice, and read
their norm to decide whether to clip and whether to skip the step. State, checkpoints and results are DeepSpeed's.
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

_EPSILON = 1e-6  # beside the norm, as DeepSpeed has it


class LeanBF16Optimizer(BF16_Optimizer):
    """AdamW on fp32 master weights and fp32 gradients, beside bf16 weights of which each rank owns a part.

    Attributes:
        skipped: [] fp32 on the device, steps skipped so far because their gradients were not finite.
    """

    def __init__(self, optimizer: torch.optim.AdamW, *arguments: Any, **named: Any) -> None:
        super().__init__(optimizer, *arguments, **named)
        self.skipped = torch.zeros((), device=self.fp32_groups_flat_partition[0].device)

    @torch.no_grad()
    def _update_hp_grad(self, lp: Any, group_idx: int, param_idx: int, clear_lp_grads: bool) -> None:
        """Add the bf16 gradient of a weight to its fp32 one, in one pass; the first of a step takes its place."""
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
        """Forget the gradients. They are not set to zero: the next step's first ones take their place."""
        for gradients, seen in zip(self.fp32_groups_gradients, self.fp32_groups_has_gradients, strict=True):
            seen[:] = [False] * len(gradients)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Clip, update the master weights and those in bf16, unless a gradient is not finite. Nothing here waits for
        the device: torch's fused AdamW takes the scale, and whether to do anything, from tensors."""
        gradients = []
        for of_group, seen in zip(self.fp32_groups_gradients, self.fp32_groups_has_gradients, strict=True):
            for gradient, is_new in zip(of_group, seen, strict=True):
                if not is_new:  # it is an old one
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
    """DeepSpeed's, whose step at ZeRO-1 under bf16 is `LeanBF16Optimizer`'s."""

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
        """Average gradients over ranks in `communication_data_type`: in place, a bucket at a time."""
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
        """DeepSpeed's, which from stage 1 on skips a step whose gradients are not finite; here stage 0 does so too."""
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

    # DeepSpeed counts skipped steps in a number. Ours are counted on the device, and added where that is read.
    @property
    def skipped_steps(self) -> int:
        """So far, for gradients that are not finite. Waits for the device; `skipped_so_far` does not."""
        return self._skipped_steps + int(self._skipped_on_device)

    @skipped_steps.setter
    def skipped_steps(self, count: int) -> None:
        """Set it, as DeepSpeed does when it loads a checkpoint."""
        self._skipped_steps = count
        if isinstance(self._skipped_on_device, torch.Tensor):
            self._skipped_on_device.zero_()

    @property
    def _skipped_on_device(self) -> torch.Tensor | int:
        optimizer = self.__dict__.get("optimizer")
        return optimizer.skipped if isinstance(optimizer, LeanBF16Optimizer) else 0

    def skipped_so_far(self) -> torch.Tensor | int:
        """A copy of `skipped_steps`, on the device where it is counted there."""
        return self._skipped_steps + self._skipped_on_device


def initialize(network: torch.nn.Module, optimizer: Any, ds_config: Mapping[str, Any]) -> Engine:
    """What `deepspeed.initialize` does for a network and an optimizer, with our engine."""
    nvtx.enable_nvtx = False  # two ranges for each hook, which cost ZeRO-3 host time
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

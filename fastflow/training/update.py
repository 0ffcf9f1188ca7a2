"""The update that ends a training step: clipped gradients, Adam; no change where a number is not finite."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fastflow.models.magic_flow import MagicFlow
from fastflow.training.config import TrainConfig


class ClippedAdam:
    """Fused Adam over clipped gradients, which waits for no device.

    Args:
        model: whose parameters are updated, on its device.
        config: learning rate and largest norm of the gradients.
        clips_inside: whether Adam itself clips the gradients of a float32 model, as it can on a GPU.
        in_graph: whether a CUDA graph captures the update.

    Attributes:
        optimizer: its learning rate is a tensor.
        parameters: of the model.
    """

    def __init__(self, model: MagicFlow, config: TrainConfig, clips_inside: bool, in_graph: bool) -> None:
        device = model.device
        on_cuda = device.type == "cuda"
        # A CPU takes the rate as a float64, the Python number itself; CUDA kernels of Adam read a float32.
        self._rate = torch.tensor(
            config.learning_rate, dtype=torch.float32 if on_cuda else torch.float64, device=device
        )
        self.optimizer = torch.optim.Adam(
            model.parameters(), lr=self._rate, fused=True, capturable=on_cuda and in_graph
        )
        # PyTorch would warn that the first steps are not captured, which is as intended.
        self.optimizer._warned_capturable_if_run_uncaptured = True
        self._largest_norm = config.clip_norm
        self._clips_inside = clips_inside and model.dtype == torch.float32

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that are updated."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def set_learning_rate(self, value: float) -> None:
        """Take steps with this learning rate from now on."""
        self._rate.fill_(value)

    def step(self, loss: Tensor) -> Tensor:
        """Clip the gradients and step; returns whether all was finite, else there is no step."""
        parameters = self.parameters
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        # Adam divides gradients by the scale, and takes no step where `found_inf` is 1. A CPU multiplies them
        # before, as `clip_grad_norm_` does; the quotient may differ from that product in its last bit.
        if self._clips_inside:
            scale = ((norm + 1e-6) / self._largest_norm).clamp(min=1.0)
            self.optimizer.grad_scale = scale  # type: ignore[attr-defined]
        else:
            clip_grads_with_norm_(parameters, self._largest_norm, norm)
        self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        return finite


class RunningStatistics:
    """The running statistics of batch norms, which forward passes in training write to, as they are now.

    Args:
        model: whose statistics are kept.
    """

    def __init__(self, model: MagicFlow) -> None:
        has_any = model.config.norm == "batch"
        norms = [part for part in model.modules() if has_any and isinstance(part, nn.BatchNorm2d)]
        self._values = [value for norm in norms for value in norm.buffers()]
        self._before = [value.clone() for value in self._values]

    def restore_unless(self, finite: Tensor) -> None:
        """Put them back where a step is skipped, which the forward pass has taken into them."""
        for value, earlier in zip(self._values, self._before, strict=True):
            value.copy_(torch.where(finite, value, earlier))

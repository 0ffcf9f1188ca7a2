"""The training step: forward, loss, backward, clipping, optimizer and average as one function of a batch.

The function is the same eagerly and captured, so what a CPU runs is what a GPU replays. It waits for no
device: a step whose loss or gradients are not finite is skipped by the optimizer itself, the figures of an
epoch add up on the device, and what the host must know of a step it reads when the next one is on its way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm, parametrize

from fastflow.models.magic_flow import MagicFlow
from fastflow.models.scoring import from_uint8
from fastflow.training import objective as objectives
from fastflow.training.augment import AUGMENTS
from fastflow.training.average import WeightAverage
from fastflow.training.capture import CapturedFunction, StepGraph, graph_for
from fastflow.training.config import TrainConfig
from fastflow.training.devices import Ranks
from fastflow.training.gradients import GradientSum, differentiate
from fastflow.training.rows import BatchRows
from fastflow.training.staging import (
    FIRST_LOGISTIC,
    LOSS,
    SKIPPED,
    Batch,
    HostReport,
    Reports,
    Staging,
    empty_report,
)


class Totals(NamedTuple):
    """Figures of all steps since they were last taken.

    Attributes:
        bits_per_dim: sum over samples, in float64.
        samples: of steps that were taken.
        skipped_steps: whose loss or gradients were not finite.
    """

    bits_per_dim: float
    samples: int
    skipped_steps: int


def _statistics(model: MagicFlow) -> list[Tensor]:
    """The running statistics of batch norms, which forward passes in training write to."""
    if model.config.norm != "batch":
        return []
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    return [value for norm in norms for value in norm.buffers()]


class TrainingStep:
    """One step of training, called with a batch; it changes the model, the optimizer and the average.

    On a CUDA device the first steps run eagerly on a side stream and are real steps; then the function is
    captured once, for the shape of the first batch, and replayed. A batch of another shape runs it eagerly,
    with the same kernels.

    Args:
        model: in training mode, on its device; ActNorm is set from the first batch where it is not.
        config: how to train.
        generator: of the host. Wrong labels come from it, and where the function is not `capturable`,
            augmentation and dequantisation do too; else these come from the device's default generator.
        autocast: makes the context of the forward pass.
        capturable: ask a CPU for the function that a CUDA device captures: numbers are drawn on the device,
            the weights of weight-normalised convolutions are made once for both halves of a coupling,
            gradients are clipped inside of Adam, and reports are read late. A CPU gains nothing by it.
        graph: what captures the function, in place of what ``config.engine`` asks for.
        ranks: the processes that share a batch, each with a step of its own; they take equal steps together.
            None is this process alone. Several run eager steps on any device.

    Raises:
        ValueError: ``config.engine`` is ``"cuda_graph"`` and the model is on no CUDA device.

    Attributes:
        negatives: hard negatives of the objective ``"pairwise"``.
        average: of the weights; None before the first step, and where ``config.ema`` is 0.
        optimizer: fused Adam; its learning rate is a tensor.
    """

    def __init__(
        self,
        model: MagicFlow,
        config: TrainConfig,
        generator: torch.Generator,
        autocast: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
        capturable: bool = False,
        graph: StepGraph | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._model, self._config, self._generator, self._autocast = model, config, generator, autocast
        self._device = device = model.device
        on_cuda = device.type == "cuda"
        self._sum = None if ranks is None or ranks.world_size == 1 else GradientSum(ranks)
        if self._sum is None:
            graph = graph or graph_for(config.engine, device)
        self._capturable = capturable or on_cuda or graph is not None
        # A CPU takes the rate as a float64, the Python number itself; CUDA kernels of Adam read a float32.
        self._rate = torch.tensor(
            config.learning_rate, dtype=torch.float32 if on_cuda else torch.float64, device=device
        )
        self.optimizer = torch.optim.Adam(
            model.parameters(), lr=self._rate, fused=True, capturable=on_cuda and graph is not None
        )
        # PyTorch would warn that the first steps are not captured, which is as intended.
        self.optimizer._warned_capturable_if_run_uncaptured = True
        self._clips_in_adam = self._capturable and model.dtype == torch.float32
        self._pairs = config.objective == "pairwise" and model.config.num_classes > 1
        self.negatives = objectives.HardNegatives(model.config.num_classes)
        self.average: WeightAverage | None = None
        self._ready = False
        # The figures of `Totals`, and how many steps were skipped since the last that was not.
        self._totals = torch.zeros(3, dtype=torch.float64, device=device)
        self._skipped = torch.zeros((), dtype=torch.float64, device=device)
        self._reports = Reports(device, late=self._capturable)
        self._last_report: HostReport | None = None
        self._staging: Staging | None = None
        self._stages = self._sum is None and (on_cuda or graph is not None)
        falls_back = config.engine == "auto"
        self._captured = (
            None if graph is None else CapturedFunction(self._run_staged, graph, model, falls_back)
        )
        self._drawn: Tensor | None = None
        # The labels of the whole batch, where this process computes some of its rows.
        self._labels: Tensor | None = None

    @property
    def captured(self) -> bool:
        """Whether a batch of the shape of the first one is a replay."""
        return self._captured is not None and self._captured.captured

    @property
    def staged(self) -> Batch | None:
        """The tensors that a captured step reads and writes; None before the first step, and on a CPU."""
        return None if self._staging is None else self._staging.batch

    def set_learning_rate(self, value: float) -> None:
        """Take steps with this learning rate from now on."""
        self._rate.fill_(value)

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """Take a step.

        Args:
            images: (n, C, H, W) uint8, on the host: all images of the batch, or those of `Ranks.rows`.
            labels: (B,) int64 on the host, from 0 to K - 1, of the whole batch; they are not looked at.

        Raises:
            FloatingPointError: ``config.max_skipped`` steps in a row were not finite. The weights are those
                that the last finite step left.
            RuntimeError: a parameter or a buffer was moved or replaced after the step was captured.
            ValueError: ActNorm cannot be set from the first batch; no layer is, and the next batch sets it.
        """
        wrong = self._draw_wrong(labels) if self._capturable else None
        if self._stages and self._staging is None:
            self._staging = Staging(images.shape, self._device)
        if self._staging is not None and self._staging.batch.images.shape == images.shape:
            batch = self._staging.load(images, labels, wrong)
            report = batch.report
            if self._captured is None:
                self.run(batch)
            else:
                self._captured()
        else:
            to = self._device
            placed = None if wrong is None else wrong.to(to)
            own, report = labels[self._rows(len(labels)).index], empty_report(len(labels), to)
            self._labels = labels if self._sum is not None else None
            self.run(Batch(images.to(to), own.to(to), placed, report))
        wrong = wrong if self._capturable else self._drawn
        self._take_in(self._reports.push(report, labels, wrong))

    def take_totals(self) -> Totals:
        """The figures of the steps since the last call; waits for the device.

        Raises:
            FloatingPointError: none of these steps was finite, or `max_skipped` of them in a row.
        """
        self._take_in(self._reports.flush())
        bits, samples, skipped = self._totals.tolist()
        self._totals.zero_()
        if skipped and not samples and self._last_report is not None:
            raise self._not_finite(self._last_report)
        return Totals(bits, int(samples), int(skipped))

    # -- the function ----------------------------------------------------------------------------------------

    def run(self, batch: Batch) -> None:
        """The step as a function of tensors on the device, which waits for none of them.

        The first call also sets ActNorm and copies the model for its average; that one may wait.

        Raises:
            ValueError: the first batch has no finite statistics at some layer; the next one sets ActNorm.
        """
        model = self._model
        rows = self._rows(batch.report.numel() - FIRST_LOGISTIC)
        x = self._augmented(batch.images, rows)
        if not self._ready:
            self._prepare(x, batch.labels)
        wrong = batch.wrong
        if self._pairs and wrong is None:
            wrong = self._drawn = self._draw_wrong(batch.labels if self._labels is None else self._labels)
        if wrong is not None:
            wrong = wrong[rows.index]
        self.optimizer.zero_grad(set_to_none=True)
        statistics = _statistics(model)
        before = [value.clone() for value in statistics]

        def loss_of(part: slice) -> tuple[Tensor, Tensor, Tensor | None]:
            with parametrize.cached() if self._capturable else contextlib.nullcontext():
                return self._loss(x[part], batch.labels[part], None if wrong is None else wrong[part])

        loss, log_probs, logistic = differentiate(loss_of, len(x), self._config.accumulate, rows.whole)
        if self._sum is not None:
            loss, logistic = self._sum(self._optimized(), rows, loss, logistic)
        finite = self._update(loss)
        # The forward pass has taken a step that is skipped into the running statistics.
        for value, earlier in zip(statistics, before, strict=True):
            value.copy_(torch.where(finite, value, earlier))
        bits = objectives.bits_per_dim(log_probs, model.config.num_dims).double().sum()
        zero = torch.zeros_like(bits)
        # A choice, unlike a product with 0, keeps the NaN of a skipped step out of the totals.
        taken = torch.stack((bits, torch.full_like(bits, len(x)), zero))
        skipped = torch.stack((zero, zero, torch.ones_like(bits)))
        self._totals.add_(torch.where(finite, taken, skipped))
        self._skipped.add_(1.0).masked_fill_(finite, 0.0)
        batch.report[LOSS].copy_(loss)
        batch.report[SKIPPED].copy_(self._skipped)
        if logistic is not None:
            batch.report[FIRST_LOGISTIC:].copy_(logistic)

    def _run_staged(self) -> None:
        assert self._staging is not None
        self.run(self._staging.batch)

    def _rows(self, whole: int) -> BatchRows:
        return BatchRows.all(whole) if self._sum is None else self._sum.ranks.rows(whole)

    def _augmented(self, images: Tensor, rows: BatchRows) -> Tensor:
        generator: torch.Generator | None = self._generator
        if self._capturable:
            # Each device draws for its own rows.
            generator, rows = None, BatchRows.all(len(images))
        x, augment = from_uint8(images), AUGMENTS[self._config.augment]
        if augment is not None:
            x = augment(x, generator, rows)
        if self._model.config.dequantize == "uniform":
            x = objectives.dequantize(x, generator, rows)
        return x

    def _prepare(self, x: Tensor, labels: Tensor) -> None:
        if not self._model.initialized:
            self._model.initialize(x, labels)
        if self._config.ema:
            self.average = WeightAverage(self._model, self._config.ema)
        self._ready = True

    def _flow(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with self._autocast():
            return self._model.encode(x.to(self._model.dtype), y)

    def _loss(self, x: Tensor, y: Tensor, wrong: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The loss, log p(x|y) (B,), and the logistic losses (B,) of pairs of labels or None."""
        c, classes = self._config, self._model.config.num_classes
        weight, temperature = c.contrast_weight, c.contrast_temperature
        if self._pairs:
            assert wrong is not None
            return objectives.pairwise_loss(self._flow, x, y, wrong, weight, temperature)
        if c.objective == "hybrid" and classes > 1:
            return *objectives.hybrid_loss(self._flow, x, y, classes, weight, temperature), None
        return *objectives.likelihood_loss(self._flow, x, y), None

    def _update(self, loss: Tensor) -> Tensor:
        """Clip the gradients, step, and average the weights; returns whether all was finite, else no step."""
        parameters = self._optimized()
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        largest = self._config.clip_norm
        # Adam divides gradients by the scale, and takes no step where `found_inf` is 1. A CPU multiplies them
        # before, as `clip_grad_norm_` does; the quotient may differ from that product in its last bit.
        if self._clips_in_adam:
            self.optimizer.grad_scale = ((norm + 1e-6) / largest).clamp(min=1.0)  # type: ignore[attr-defined]
        else:
            clip_grads_with_norm_(parameters, largest, norm)
        self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        if self.average is not None:
            self.average.update()
        return finite

    def _optimized(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    # -- the host --------------------------------------------------------------------------------------------

    def _draw_wrong(self, labels: Tensor) -> Tensor | None:
        return self.negatives.draw(labels, self._generator) if self._pairs else None

    def _take_in(self, report: HostReport | None) -> None:
        if report is None:
            return
        self._last_report = report
        skipped = int(report.values[SKIPPED])
        if skipped == 0 and report.wrong is not None:
            self.negatives.update(report.labels, report.wrong, report.values[FIRST_LOGISTIC:])
        if skipped >= self._config.max_skipped:
            raise self._not_finite(report)

    def _not_finite(self, report: HostReport) -> FloatingPointError:
        loss, skipped = float(report.values[LOSS]), int(report.values[SKIPPED])
        return FloatingPointError(
            f"the loss became {loss}; steps in a row whose loss or gradients are not finite, all skipped: "
            f"{skipped}; lower learning_rate ({self._config.learning_rate}) or set dequantize"
        )

"""The training step: forward, loss, backward, clipping, optimizer and average as one function of a batch.

The function is the same eagerly and captured, so what a CPU runs is what a GPU replays. It waits for no
device: a step whose loss or gradients are not finite is skipped by the optimizer itself, the figures of an
epoch add up on the device, and what the host must know of a step it reads when the next one is on its way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from fastflow.models.magic_flow import MagicFlow
from fastflow.models.scoring import from_uint8
from fastflow.training import objective as objectives
from fastflow.training.augment import AUGMENTS
from fastflow.training.average import WeightAverage
from fastflow.training.capture import CapturedFunction, StepGraph, graph_for
from fastflow.training.config import TrainConfig
from fastflow.training.devices import Ranks
from fastflow.training.gradients import GradientSum, differentiate
from fastflow.training.ledger import StepFigures, StepLedger, not_finite
from fastflow.training.ledger import Totals as Totals
from fastflow.training.optimizer_state import load_optimizer, optimizer_tensors, part, with_prefix
from fastflow.training.phases import Moment, Phase
from fastflow.training.rows import BatchRows
from fastflow.training.staging import (
    BITS,
    COUNTERS,
    FIRST_LOGISTIC,
    LOSS,
    SKIPPED,
    Batch,
    HostReport,
    Staging,
    empty_report,
)
from fastflow.training.update import ClippedAdam, RunningStatistics


class TrainingStep:
    """One step of training, called with a batch; it changes the model, the optimizer and the average.

    On a CUDA device the first steps run eagerly on a side stream and are real steps; then the function is
    captured once, for the shape of the first batch, and replayed. A batch of another shape runs it eagerly,
    with the same kernels. Each phase of ``config.phases`` is a function of its own, and `set_moment` changes
    over to it.

    Args:
        model: in training mode, on its device; ActNorm is set from the first batch where it is not.
        config: how to train.
        generator: of the host. Wrong labels come from it, and where the function is not `capturable`,
            augmentation and dequantisation do too; else these come from the device's default generator.
        autocast: makes the context of the forward pass.
        capturable: ask a CPU for the function that a CUDA device captures: numbers are drawn on the device,
            the weights of weight-normalised convolutions are made once for both halves of a coupling,
            gradients are clipped inside of Adam, and reports are read late. A CPU gains nothing by it.
        graph: what captures the function of the first phase, in place of what ``config.engine`` asks for; its
            successors capture those of the other phases.
        ranks: the processes that share a batch, each with a step of its own; they take equal steps together.
            None is this process alone. Several run eager steps on any device.

    Raises:
        ValueError: ``config.engine`` is ``"cuda_graph"`` and the model is on no CUDA device.

    Attributes:
        negatives: hard negatives of ``"pairwise"``, and of ``"hybrid"`` over some rivals; all phases share
            them.
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
        self._adam = ClippedAdam(model, config, self._capturable, graph is not None)
        self.optimizer = self._adam.optimizer
        # A weight that ramps up must be a tensor, which a replay reads anew.
        self._weight = torch.zeros(
            (), dtype=torch.float64 if model.dtype == torch.float64 else torch.float32, device=device
        )
        self.negatives = objectives.HardNegatives(model.config.num_classes)
        self.average: WeightAverage | None = None
        self._ready = False
        # The figures of `Totals`, and how many steps were skipped since the last that was not.
        self._counters = torch.zeros(COUNTERS, dtype=torch.float64, device=device)
        self._totals, self._skipped = self._counters[: SKIPPED - BITS], self._counters[SKIPPED - BITS]
        self._ledger = StepLedger(device, late=self._capturable)
        self._drawn: Tensor | None = None
        # The labels of the whole batch, where this process computes some of its rows.
        self._labels: Tensor | None = None
        self._enter(0, graph)
        assert self._phase.weight is not None
        self._weight.fill_(self._phase.weight)

    def _enter(self, index: int, graph: StepGraph | None) -> None:
        """Make the function of a phase that of the next steps; the memory of an earlier capture is freed."""
        self._index, self._graph = index, graph
        self._phase: Phase = self._config.phases[index]
        self._draws = self._phase.drawn(self._model.config.num_classes)
        self._staging: Staging | None = None
        self._captured: CapturedFunction | None = None
        if graph is not None:
            falls_back = self._config.engine == "auto"
            self._captured = CapturedFunction(self._run_staged, graph, self._model, falls_back)

    @property
    def captured(self) -> bool:
        """Whether a batch of the shape of the phase's first one is a replay."""
        return self._captured is not None and self._captured.captured

    @property
    def staged(self) -> Batch | None:
        """The tensors that a captured step reads and writes; None before its phase, and on a CPU."""
        return None if self._staging is None else self._staging.batch

    @property
    def rivals(self) -> int | None:
        """R where the steps of the phase take wrong labels (B, R); None where they take (B,) or none."""
        return self._draws if self._draws and self._phase.objective == "hybrid" else None

    @property
    def figures(self) -> StepFigures | None:
        """The figures of the latest step that the host knows of; None before the first has arrived."""
        return self._ledger.figures

    def set_learning_rate(self, value: float) -> None:
        """Take steps with this learning rate from now on."""
        self._adam.set_learning_rate(value)

    def set_moment(self, moment: Moment) -> None:
        """Take steps of this phase, with this weight of the discriminative term, from now on.

        Without a call, steps are those of the first phase with its full weight. Where the average begins
        anew, this call copies the weights as they are into it.
        """
        if moment.phase != self._index:
            self._enter(moment.phase, None if self._graph is None else self._graph.successor())
        self._weight.fill_(moment.weight)
        if moment.restarts_average and self.average is not None:
            self.average.restart()

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
        stages = self._sum is None and (self._device.type == "cuda" or self._captured is not None)
        if stages and self._staging is None:
            self._staging = Staging(images.shape, self._device, self.rivals)
        if self._staging is not None and self._staging.batch.images.shape == images.shape:
            report = self._staging.load(images, labels, wrong).report
            (self._captured or self._run_staged)()
        else:
            to = self._device
            placed = None if wrong is None else wrong.to(to)
            report = empty_report(len(labels), to, self.rivals or 1)
            own = labels[self._rows(len(labels)).index]
            self._labels = None if self._sum is None else labels
            self.run(Batch(images.to(to), own.to(to), placed, report))
        wrong = wrong if self._capturable else self._drawn
        self._take_in(self._ledger.push(report, labels, wrong))

    def flush(self) -> None:
        """Take in the report that is still on its way; waits for the device.

        Raises:
            FloatingPointError: `max_skipped` steps in a row were not finite.
        """
        self._take_in(self._ledger.flush())

    def take_totals(self) -> Totals:
        """The figures of the steps since the last call; waits for the device.

        Raises:
            FloatingPointError: none of these steps was finite, or `max_skipped` of them in a row.
        """
        self.flush()
        bits, samples, skipped = self._totals.tolist()
        self._totals.zero_()
        self._ledger.forget_totals()
        if skipped and not samples and self._ledger.last is not None:
            raise not_finite(self._ledger.last, self._config.learning_rate)
        return Totals(bits, int(samples), int(skipped))

    # -- its state -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Everything by which the steps that follow differ from those of a new object, but for the weights.

        It is the same on all ranks. Waits for the device. A report that is pending stays so.
        """
        state = optimizer_tensors(self._model, self.optimizer) | self._ledger.state_dict()
        state |= {"counters": self._counters, "negatives": self.negatives.losses}
        state["ready"] = torch.tensor(self._ready)
        if self.average is not None:
            state |= with_prefix("average.", self.average.state_dict())
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from the state of another object of the same settings, whose weights the model has already.

        Raises:
            KeyError: an entry is missing.
            ValueError: an entry has another shape.
        """
        load_optimizer(self._model, self.optimizer, state)
        self._ledger.load_state_dict(state)
        self._counters.copy_(state["counters"])
        self.negatives.losses = state["negatives"].clone()
        self._ready = bool(state["ready"])
        if self._ready and self._config.ema:
            self.average = WeightAverage(self._model, self._config.ema)
            self.average.load_state_dict(part(state, "average."))

    # -- the function ----------------------------------------------------------------------------------------

    def run(self, batch: Batch) -> None:
        """The step as a function of tensors on the device, which waits for none of them.

        The first call also sets ActNorm and copies the model for its average; that one may wait.

        Raises:
            ValueError: the first batch has no finite statistics at some layer; the next one sets ActNorm.
        """
        model = self._model
        rows = self._rows((batch.report.numel() - FIRST_LOGISTIC) // (self.rivals or 1))
        x = self._augmented(batch.images, rows)
        if not self._ready:
            self._prepare(x, batch.labels)
        wrong = batch.wrong
        if self._draws and wrong is None:
            wrong = self._drawn = self._draw_wrong(batch.labels if self._labels is None else self._labels)
        own_wrong = None if wrong is None else wrong[rows.index]
        self.optimizer.zero_grad(set_to_none=True)
        statistics = RunningStatistics(model)

        def loss_of(part: slice) -> tuple[Tensor, Tensor, Tensor | None]:
            with parametrize.cached() if self._capturable else contextlib.nullcontext():
                return self._loss(x[part], batch.labels[part], None if own_wrong is None else own_wrong[part])

        loss, log_probs, logistic = differentiate(loss_of, len(x), self._config.accumulate, rows.whole)
        bits = objectives.bits_per_dim(log_probs, model.config.num_dims).double().sum()
        if self._sum is not None:
            loss, bits, logistic = self._sum(self._adam.parameters, rows, loss, bits, logistic)
        finite = self._adam.step(loss)
        if self.average is not None:
            self.average.update()
        statistics.restore_unless(finite)
        zero = torch.zeros_like(bits)
        # A choice, unlike a product with 0, keeps the NaN of a skipped step out of the totals.
        taken = torch.stack((bits, torch.full_like(bits, rows.whole), zero))
        skipped = torch.stack((zero, zero, torch.ones_like(bits)))
        self._totals.add_(torch.where(finite, taken, skipped))
        self._skipped.add_(1.0).masked_fill_(finite, 0.0)
        batch.report[LOSS].copy_(loss)
        batch.report[BITS:FIRST_LOGISTIC].copy_(self._counters)
        if logistic is not None:
            batch.report[FIRST_LOGISTIC:].copy_(logistic.flatten())

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
        """The loss, log p(x|y) (B,), and the logistic losses (B,) or (B, R) of pairs of labels or None."""
        phase, classes = self._phase, self._model.config.num_classes
        weight, temperature = self._weight, phase.temperature
        assert temperature is not None
        if classes < 2 or phase.objective == "likelihood":
            return *objectives.likelihood_loss(self._flow, x, y), None
        if not self._draws:
            return *objectives.hybrid_loss(self._flow, x, y, classes, weight, temperature), None
        assert wrong is not None
        loss = objectives.pairwise_loss if phase.objective == "pairwise" else objectives.rivals_loss
        return loss(self._flow, x, y, wrong, weight, temperature)

    # -- the host --------------------------------------------------------------------------------------------

    def _draw_wrong(self, labels: Tensor) -> Tensor | None:
        if not self._draws:
            return None
        return self.negatives.draw(labels, self._generator, self.rivals)

    def _take_in(self, report: HostReport | None) -> None:
        if report is None:
            return
        skipped = int(report.values[SKIPPED])
        if skipped == 0 and report.wrong is not None:
            losses = report.values[FIRST_LOGISTIC:].view(report.wrong.shape)
            self.negatives.update(report.labels, report.wrong, losses)
        if skipped >= self._config.max_skipped:
            raise not_finite(report, self._config.learning_rate)

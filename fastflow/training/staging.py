"""Batches on their way to the device and reports on their way back, neither of which the host waits for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Entries of a report before the logistic losses: the loss, then the counters.
LOSS, BITS, SAMPLES, SKIPPED_STEPS, SKIPPED, FIRST_LOGISTIC = range(6)
# The counters are the entries of a report between the loss and the logistic losses.
COUNTERS = FIRST_LOGISTIC - BITS


class Batch(NamedTuple):
    """The tensors that a training step reads, and the one that it writes.

    Attributes:
        images: (B, C, H, W) uint8.
        labels: (B,) int64.
        wrong: (B,) or (B, R) int64, labels to tell apart from the right ones; None where the step draws them
            itself.
        report: (5 + B R) float64: the loss; the counters, which are the figures of `Totals` so far and the
            number of steps in a row that were skipped; and the logistic losses of the pairs of labels. Where
            several processes share a batch, the report and wrong labels are those of the whole batch, images
            and labels those of the rows of this one.
    """

    images: Tensor
    labels: Tensor
    wrong: Tensor | None
    report: Tensor


def empty_report(batch_size: int, device: torch.device, rivals: int = 1) -> Tensor:
    """A report (5 + B R) of a batch with R rivals for each image, all zero."""
    return torch.zeros(FIRST_LOGISTIC + batch_size * rivals, dtype=torch.float64, device=device)


class Staging:
    """A batch that stays where it is on the device, and is written by copies that the host does not wait for.

    On a CUDA device, two sets of page-locked tensors take turns: what the host writes next is never what a
    copy still reads.

    Args:
        shape: (B, C, H, W) of the images.
        device: where the batch lies.
        rivals: R of wrong labels (B, R); None of (B,).

    Attributes:
        batch: on the device.
    """

    def __init__(self, shape: torch.Size, device: torch.device, rivals: int | None = None) -> None:
        self._places = _empty(shape, device, rivals)
        self.batch = Batch(*self._places, empty_report(shape[0], device, rivals or 1))
        self._on_cuda = device.type == "cuda"
        host, turns = torch.device("cpu"), 2 if self._on_cuda else 0
        self._pages = [_empty(shape, host, rivals, pinned=True) for _ in range(turns)]
        self._copied = [torch.cuda.Event() for _ in range(turns)]
        self._turn = 0

    def load(self, images: Tensor, labels: Tensor, wrong: Tensor | None) -> Batch:
        """Write images (B, C, H, W) uint8, labels (B,) and wrong labels, (B,) or (B, R), of the host."""
        values = (images, labels, wrong)
        if not self._on_cuda:
            return self._copy(values)
        self._turn = 1 - self._turn
        pages, copied = self._pages[self._turn], self._copied[self._turn]
        copied.synchronize()
        self._copy(
            tuple(
                None if value is None else page.copy_(value)
                for value, page in zip(values, pages, strict=True)
            )
        )
        copied.record()
        return self.batch

    def _copy(self, values: tuple[Tensor | None, ...]) -> Batch:
        for value, place in zip(values, self._places, strict=True):
            if value is not None:
                place.copy_(value, non_blocking=True)
        return self.batch


def _empty(
    shape: torch.Size, device: torch.device, rivals: int | None, pinned: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Images (B, C, H, W) uint8, labels (B,) and wrong labels (B,) or (B, R), all zero."""
    images = torch.zeros(shape, dtype=torch.uint8, device=device, pin_memory=pinned)
    labels, wrong = (
        torch.zeros(size, dtype=torch.int64, device=device, pin_memory=pinned)
        for size in ((shape[0],), (shape[0],) if rivals is None else (shape[0], rivals))
    )
    return images, labels, wrong


class HostReport(NamedTuple):
    """The report of a step, on the host.

    Attributes:
        values: of `Batch.report`.
        labels: (B,) of the batch.
        wrong: (B,) or (B, R), or None where the objective takes none.
    """

    values: Tensor
    labels: Tensor
    wrong: Tensor | None


class Reports:
    """Reports of steps, read one step late where the device would have to be waited for.

    Args:
        device: that writes them.
        late: whether a report is handed out with the next one.
    """

    def __init__(self, device: torch.device, late: bool) -> None:
        self._on_cuda, self._late = device.type == "cuda", late
        self._pages: list[Tensor | None] = [None, None]
        self._turn = 0
        self._pending: tuple[HostReport, torch.cuda.Event | None] | None = None

    def push(self, report: Tensor, labels: Tensor, wrong: Tensor | None) -> HostReport | None:
        """Fetch a report, and hand out the latest one that has arrived for certain.

        Args:
            report: (5 + B R) on the device.
            labels: (B,) on the host.
            wrong: (B,) or (B, R) on the host.
        """
        before = self._pending
        self._pending = self._fetch(report, labels, wrong)
        return _arrived(before) if self._late else self.flush()

    def flush(self) -> HostReport | None:
        """The report that was not handed out yet, if there is one; the device is waited for."""
        before, self._pending = self._pending, None
        return _arrived(before)

    def pending(self) -> HostReport | None:
        """The report that the next call will hand out, for the state of a training; it stays pending."""
        return _arrived(self._pending)

    def restore(self, report: HostReport | None) -> None:
        """Take a report for the one that is pending."""
        self._pending = None if report is None else (report, None)

    def _fetch(
        self, report: Tensor, labels: Tensor, wrong: Tensor | None
    ) -> tuple[HostReport, torch.cuda.Event | None]:
        if not self._on_cuda:
            return HostReport(report.clone(), labels, wrong), None
        self._turn = 1 - self._turn
        page = self._pages[self._turn]
        if page is None or page.shape != report.shape:
            page = torch.zeros(report.shape, dtype=report.dtype, pin_memory=True)
            self._pages[self._turn] = page
        page.copy_(report, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return HostReport(page, labels, wrong), event


def _arrived(pending: tuple[HostReport, torch.cuda.Event | None] | None) -> HostReport | None:
    if pending is None:
        return None
    report, event = pending
    if event is not None:
        event.synchronize()
    return report

"""Reading ahead of the model: spawned processes turn files into images, in order. Torch-free."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection, wait

import numpy as np
from numpy.typing import NDArray

from fastflow.archive.inputs import Inputs, Item
from fastflow.data.grain import grain_numbers
from fastflow.data.preprocess import Preprocess
from fastflow.data.slices import read_image
from fastflow.errors import VolumeError

# A chunk is the files of one message to a worker.
FILES_PER_CHUNK = 4
CHUNKS_PER_WORKER = 3
# For fewer files than this, starting processes takes longer than reading.
MIN_FILES_FOR_POOL = 8
# Seconds for a chunk: a file system that hangs must not hold up a run for ever.
CHUNK_TIMEOUT = 600.0

Image = NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class Decoded:
    """An input that was read, or why it could not be.

    Attributes:
        item: the input.
        size: bytes of the file, -1 where there is none.
        mtime_ns: its last change in nanoseconds since 1970, -1 where there is no file.
        result: (n, 1, H, W) uint8, or why there is none.
        flags: (code, message) of each doubt about it.
        seconds: that reading took.
        measured: (n, 75) of its slices, see `fastflow.data.statistics.measure`; None where there are none.
        grain: (n, 6) of its slices, see `fastflow.data.grain.grain_numbers`; None where there are none.
    """

    item: Item
    size: int
    mtime_ns: int
    result: Image | VolumeError
    flags: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0
    measured: NDArray[np.float64] | None = None
    grain: NDArray[np.float64] | None = None


def file_state(path: str) -> tuple[int, int]:
    """(size in bytes, last change in nanoseconds), -1 where there is no such file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return -1, -1
    return status.st_size, status.st_mtime_ns


def decode_one(item: Item, preprocess: Preprocess) -> Decoded:
    """Read one input. No file makes it raise an exception."""
    start = time.perf_counter()
    # The state is taken before reading: a later run reads a file again that is being written now.
    size, mtime = file_state(item.path)
    flags: tuple[tuple[str, str], ...] = ()
    result: Image | VolumeError
    measured = grain = None
    try:
        image = read_image(item.path, preprocess)
        result, flags = image.images, tuple((flag.code, flag.message) for flag in image.flags)
        measured, grain = image.measure(), grain_numbers(image.images[:, 0])
    except VolumeError as error:
        # The error is copied: its traceback would hold the file's buffers for as long as it is kept.
        reason = _folder_error(item.path, error)
        result = VolumeError(reason.path, reason.code, reason.message)
    except Exception as error:
        result = VolumeError(item.path, "unreadable", f"{type(error).__name__}: {error}")
    return Decoded(item, size, mtime, result, flags, time.perf_counter() - start, measured, grain)


def _folder_error(path: str, error: VolumeError) -> VolumeError:
    """A better error for a folder: it is an input for its name, or because its files cannot be listed."""
    if error.code in ("not_a_file", "unsupported_format") and os.path.isdir(path):
        try:
            os.scandir(path).close()
        except OSError as reason:
            return VolumeError(
                path, "unreadable", f"the folder cannot be listed: {reason.strerror or reason}"
            )
    return error


def decode(
    items: Iterable[Item],
    preprocess: Preprocess,
    workers: int = 1,
    ahead: int = 0,
    timeout: float = CHUNK_TIMEOUT,
) -> Generator[Decoded, None, None]:
    """Read inputs in order, by processes that are started for it.

    At most ``FILES_PER_CHUNK * CHUNKS_PER_WORKER * workers`` inputs, or `ahead` where that is more, are read
    and not yet taken. A process that dies (out of memory, a crash in a library) or hangs costs the file that
    it was reading an error of code ``worker`` or ``timeout``, and no other file.

    Args:
        items: the inputs; taken from as needed.
        preprocess: which slices to read of them, and how.
        workers: number of processes.
        ahead: inputs to have read before they are asked for.
        timeout: seconds that a chunk may take.
    """
    items = iter(items)
    first = list(itertools.islice(items, MIN_FILES_FOR_POOL))
    if len(first) < MIN_FILES_FOR_POOL:
        for item in first:
            yield decode_one(item, preprocess)
        return
    pool = Pool(preprocess, workers, ahead, timeout)
    try:
        yield from pool.run(itertools.chain(first, items))
    finally:
        pool.stop()


class Pool:
    """Worker processes, and chunks of inputs on their way through them. See `decode`.

    Args:
        preprocess: which slices to read, and how.
        workers: number of processes.
        ahead: inputs to have read before they are asked for.
        timeout: seconds that a chunk may take.
    """

    def __init__(self, preprocess: Preprocess, workers: int, ahead: int, timeout: float) -> None:
        self.preprocess, self.workers, self.timeout = preprocess, workers, timeout
        self.chunks = max(workers * CHUNKS_PER_WORKER, ahead // FILES_PER_CHUNK)
        self.pending: collections.deque[tuple[list[Item], Future[list[Decoded]]]] = collections.deque()
        self.executor = self._start(workers)

    def _start(self, workers: int) -> ProcessPoolExecutor:
        # Processes are spawned: a fork would copy the threads of torch, and every file that is open.
        return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _end_with_the_parent)

    def run(self, items: Iterator[Item]) -> Iterator[Decoded]:
        """Read inputs, in order."""
        while True:
            while len(self.pending) < self.chunks and (
                chunk := list(itertools.islice(items, FILES_PER_CHUNK))
            ):
                self.pending.append((chunk, self._submit(chunk)))
            if not self.pending:
                return
            chunk, future = self.pending.popleft()
            try:
                yield from future.result(self.timeout)
            except (BrokenProcessPool, FutureTimeoutError):
                yield from self._one_by_one(chunk)

    def _submit(self, chunk: list[Item]) -> Future[list[Decoded]]:
        try:
            return self.executor.submit(_decode_chunk, chunk, self.preprocess)
        except BrokenProcessPool as error:
            broken: Future[list[Decoded]] = Future()
            broken.set_exception(error)
            return broken

    def _one_by_one(self, chunk: Sequence[Item]) -> Iterator[Decoded]:
        """Read each file of a chunk in a process of its own, to find the one that kills it; then go on."""
        self.stop()
        for item in chunk:
            self.executor = self._start(1)
            try:
                yield from self._submit([item]).result(self.timeout)
            except BrokenProcessPool:
                error = VolumeError(
                    item.path, "worker", "the process that was reading it died (out of memory, or a crash)"
                )
                yield Decoded(item, *file_state(item.path), error)
            except FutureTimeoutError:
                error = VolumeError(item.path, "timeout", f"could not be read within {self.timeout:.0f} s")
                yield Decoded(item, -1, -1, error, seconds=self.timeout)
            self.stop()
        self.executor = self._start(self.workers)
        self.pending = collections.deque((c, f if _is_read(f) else self._submit(c)) for c, f in self.pending)

    def stop(self) -> None:
        """End the processes, whatever they are doing."""
        processes = list((getattr(self.executor, "_processes", None) or {}).values())
        self.executor.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()


def _is_read(future: Future[list[Decoded]]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def count_elsewhere(items: Inputs) -> int:
    """The number of inputs, counted by a process that is started for it.

    Raises:
        EOFError: the process died.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    # A run does not wait for a daemon at its end.
    process = context.Process(target=_count, args=(items, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        return int(ours.recv())
    finally:
        process.join()


def _count(items: Inputs, result: Connection) -> None:
    _end_with_the_parent()
    result.send(sum(1 for _ in items))


def _decode_chunk(chunk: list[Item], preprocess: Preprocess) -> list[Decoded]:
    return [decode_one(item, preprocess) for item in chunk]


def _end_with_the_parent() -> None:
    """Let a worker end with its parent, also with one that is killed.

    A worker waits on a pipe whose other end it holds itself, so the pipe does not end with the parent. Ctrl-C
    reaches the worker too, but the parent ends it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:

        def watch() -> None:
            wait([parent.sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()

"""The work of `classify` on Ray: tasks read, actors hold the model, and results come back in order.

Torch-free until a model is loaded: tasks that read import this module.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from os import PathLike
from typing import Any

from fastflow.archive.batches import (
    Runner,
    ScoredInput,
    Timings,
    score_batches,
    slices_per_volume,
    slots_of,
)
from fastflow.archive.decode import CHUNK_TIMEOUT, Pool
from fastflow.archive.inputs import Item
from fastflow.archive.options import pick_device
from fastflow.archive.scorers import ModelScorer
from fastflow.data.preprocess import Preprocess
from fastflow.errors import RunStoppedError

# The model is loaded for each dataset, a block of tasks, so blocks double. Memory holds one of them.
FIRST_BLOCK_INPUTS = 1 << 12
MAX_BLOCK_INPUTS = 1 << 17
# Ray Data takes up to tenths of a second for a task; a batch that is larger is a task all the same.
MAX_TASK_INPUTS = 64
MAX_TASK_SLICES = 512
# A process that reads is replaced after so many tasks, because of what libraries leave behind in it.
MAX_CALLS_PER_PROCESS = 100
# The rows of Ray Data have one column of bytes: errors, and names that are no Unicode, pass as no other type.
DATA = "data"
Row = dict[str, bytes]


def ray_runner(
    folder: str | PathLike[str],
    preprocess: Preprocess,
    batch_size: int,
    workers: int,
    precision: str,
    device: str,
    latents: bool = False,
) -> Runner:
    """A runner that spreads the work over Ray Data: tasks read, actors load the model once for many batches.

    It joins the Ray that this process is connected to or that ``RAY_ADDRESS`` names, and takes what CPUs and
    GPUs that has; a cluster's nodes need fastflow installed, and must see the model's folder and the files
    under the paths that they have here. Where there is none, it starts a Ray on this machine for the time of
    the run, with `workers` reading tasks at a time, without telemetry.

    Batches are those of the local engine and come back in the order of the inputs, so on one kind of device
    rows are equal to the bit. A file that kills or hangs the process that reads it gets its error row
    (``worker``, ``timeout``) as it does locally. A process or node that is lost has its work done again by
    another.

    A task is some dozens of inputs, which become durable together. A few hundred inputs gain nothing from
    Ray.

    Args:
        folder: of the model.
        preprocess: which slices to read of the inputs, and how.
        batch_size: slices per pass.
        workers: reading tasks at a time on this machine; a cluster's are as many as it has CPUs.
        precision: see `fastflow.models.scoring.LabelScorer`.
        device: ``"cuda"``: one GPU for each actor. ``"cpu"``. ``"auto"``: GPUs if Ray has any.
        latents: whether inputs get the correlations of their latents too.

    Returns:
        The runner. Of its timings, ``scoring`` is the time of all actors in the model, ``waiting`` their time
        between batches and ``reading`` that of all reading processes. It raises `RunStoppedError` where Ray
        cannot go on, and ConnectionError where there is no cluster at ``RAY_ADDRESS``.

    Raises:
        ValueError: Ray is not installed, or the precision does not exist.
    """
    try:
        import ray.data
    except ImportError as error:
        raise ValueError("engine 'ray' needs Ray: pip install 'fastflow[ray]'") from error
    from fastflow.models.scoring import PRECISIONS

    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    model = os.path.abspath(folder)

    def run(items: Iterator[Item], timings: Timings) -> Generator[list[ScoredInput], None, None]:
        with _session(workers) as local, _quiet():
            reader = {"preprocess": preprocess}
            scorer = {"folder": model, "precision": precision, "batch_size": batch_size} | reader
            scorer["latents"] = latents
            pipeline = _pipeline(reader, scorer, device, workers if local else None)
            # Other nodes have another working directory.
            base = "" if local else os.getcwd()
            try:
                for block in _blocks(_tasks(items, preprocess, batch_size)):
                    yield from _work(pipeline, block, base, timings)
            except (ray.exceptions.RayError, ray.data.exceptions.ExecutionTimeoutError) as error:
                raise RunStoppedError(
                    f"Ray cannot go on: {_reason(error)}. The rows so far are kept; --resume goes on"
                ) from error

    return run


# -- Ray itself ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _session(workers: int) -> Iterator[bool]:
    """A connection to Ray for a while. Yields whether it is one on this machine, started for it."""
    import ray

    # Ray's core writes past Python's logging, and calls an error what Ray Data does with every actor.
    level = os.environ.get("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Ray Data asks at every dataset whether to collect usage statistics, so the answer stays set.
    with _environment(RAY_USAGE_STATS_ENABLED="0", RAY_BACKEND_LOG_LEVEL=level):
        if ray.is_initialized():
            yield False
            return
        local = os.environ.get("RAY_ADDRESS", "") in ("", "local")
        # Without "local", a Ray that somebody else has started on this machine would be taken.
        start = (
            functools.partial(ray.init, "local", num_cpus=workers + 1, include_dashboard=False)
            if local
            else ray.init
        )
        try:
            with _own_sigterm():
                start(log_to_driver=False, configure_logging=False, logging_level=logging.ERROR)
            yield local
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Take the signal back from Ray, whose processes end with this one in any case."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    # Ray sets the last two itself: how to log in to it, and what `breakpoint` means.
    before = {name: os.environ.get(name) for name in (*values, "RAY_AUTH_MODE", "PYTHONBREAKPOINT")}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Ray Data, which logs every dataset; its errors come as exceptions too."""
    logger = logging.getLogger("ray.data")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _reason(error: BaseException) -> str:
    """The cause of an error, in one line; Ray wraps it more than once, together with tracebacks."""
    from ray.data.exceptions import SystemException

    while (cause := getattr(error, "cause", None) or error.__cause__) and not isinstance(
        cause, SystemException
    ):
        error = cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


# -- the driver ----------------------------------------------------------------------------------------------


def _tasks(items: Iterator[Item], preprocess: Preprocess, batch_size: int) -> Iterator[list[Item]]:
    """Inputs that are read together: whole batches of `score_batches`, known before anything is read."""
    per_volume = slices_per_volume(preprocess)
    most = min(MAX_TASK_INPUTS, MAX_TASK_SLICES // per_volume)
    task: list[Item] = []
    used = 0
    for item in items:
        slots = slots_of(item, per_volume)
        # A new batch begins.
        if task and used + slots > batch_size:
            used = 0
            if len(task) >= most:
                yield task
                task = []
        task.append(item)
        used += slots
    if task:
        yield task


def _blocks(tasks: Iterator[list[Item]]) -> Iterator[list[list[Item]]]:
    size = FIRST_BLOCK_INPUTS
    block: list[list[Item]] = []
    inputs = 0
    for task in tasks:
        block.append(task)
        inputs += len(task)
        if inputs >= size:
            yield block
            block, inputs, size = [], 0, min(2 * size, MAX_BLOCK_INPUTS)
    if block:
        yield block


def _pipeline(
    reader: dict[str, Any], scorer: dict[str, Any], device: str, workers: int | None
) -> Callable[[list[Row]], Any]:
    """A function from a dataset of tasks to one of scored inputs; `workers` is None on a cluster."""
    import ray.data
    import torch

    resources = ray.cluster_resources()
    cpus, gpus = (int(resources.get(name, 0)) for name in ("CPU", "GPU"))
    # A GPU may also be one that the cluster has yet to start.
    gpus = {"cpu": 0, "cuda": max(1, gpus)}.get(device, gpus)
    # Reading must get a share where there is only one CPU.
    cpu = 1.0 if cpus > 1 else 0.5
    # Here one actor takes the threads that the local engine would; on a cluster as many actors as have work.
    actors = gpus or (max(1, cpus - 1) if workers is None else 1)
    scorer = scorer | {
        "device": device if gpus else "cpu",
        "threads": None if workers is None else torch.get_num_threads(),
    }
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_options.preserve_order = True

    def build(rows: list[Row]) -> Any:
        with ray.data.DataContext.current(context):
            batches: Any = ray.data.from_items(rows, override_num_blocks=len(rows))
        # Ray joins stages of equal options, and actors would read files: `max_calls` also keeps them apart.
        reading = ray.data.TaskPoolStrategy(size=workers)
        read = batches.map(
            _read, fn_kwargs=reader, compute=reading, num_cpus=cpu, max_calls=MAX_CALLS_PER_PROCESS
        )
        pool = ray.data.ActorPoolStrategy(min_size=1, max_size=actors)
        return read.map(
            _Scorer, fn_constructor_kwargs=scorer, compute=pool, num_cpus=cpu, num_gpus=1 if gpus else 0
        )

    return build


def _work(
    pipeline: Callable[[list[Row]], Any], tasks: list[list[Item]], base: str, timings: Timings
) -> Iterator[list[ScoredInput]]:
    def absolute(item: Item) -> Item:
        return dataclasses.replace(item, path=os.path.join(base, item.path))

    dataset = pipeline([{DATA: pickle.dumps([absolute(item) for item in task])} for task in tasks])
    # The tables are closed at once where the run stops: Ray would go on until the iterator is collected.
    with contextlib.closing(iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))) as tables:
        rows = (row for table in tables for row in table.column(DATA).to_pylist())
        for task, row in zip(tasks, rows, strict=True):
            scored, spent = pickle.loads(row)
            timings.reading += spent.reading
            timings.waiting += spent.waiting
            timings.scoring += spent.scoring
            yield [dataclasses.replace(one, item=item) for one, item in zip(scored, task, strict=True)]


# -- on the nodes --------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _pool(preprocess: Preprocess) -> Pool:
    return Pool(preprocess, workers=1, ahead=0, timeout=CHUNK_TIMEOUT)


def _read(row: Row, preprocess: Preprocess) -> Row:
    """Read a task's inputs in a process under this one.

    A file that kills the process costs neither the task nor the other files, all of which Ray would try again
    without knowing the culprit.
    """
    pool = _pool(preprocess)
    try:
        return {DATA: pickle.dumps(list(pool.run(iter(pickle.loads(row[DATA])))))}
    except BaseException:
        # Files that are still under way must not become the next task's.
        pool.stop()
        _pool.cache_clear()
        raise


class _Scorer:
    """A model that stays loaded."""

    def __init__(
        self,
        folder: str,
        preprocess: Preprocess,
        batch_size: int,
        precision: str,
        device: str,
        threads: int | None,
        latents: bool,
    ) -> None:
        import torch

        from fastflow.models.magic_flow import MagicFlow
        from fastflow.models.scoring import LabelScorer

        if threads is not None:
            # Ray would give it one thread, however many the machine has.
            torch.set_num_threads(threads)
        self.scorer = ModelScorer(LabelScorer(MagicFlow.load(folder, pick_device(device)), precision))
        self.preprocess, self.batch_size, self.latents = preprocess, batch_size, latents
        self.idle_since = time.perf_counter()

    def __call__(self, row: Row) -> Row:
        timings = Timings(waiting=time.perf_counter() - self.idle_since)
        decoded = pickle.loads(row[DATA])
        timings.reading = sum(one.seconds for one in decoded)
        batches = score_batches(self.scorer, decoded, self.preprocess, self.batch_size, timings, self.latents)
        result = {DATA: pickle.dumps(([one for batch in batches for one in batch], timings))}
        self.idle_since = time.perf_counter()
        return result

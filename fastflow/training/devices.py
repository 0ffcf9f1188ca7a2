"""Training on several devices: one process, or rank, for each, connected by Lightning Fabric.

Every rank runs the same program on the same order of batches, and computes its rows of each batch. Gradients
are added up in one collective per step; only the first rank writes files, and reads volumes for all.

The wrapper of PyTorch's DistributedDataParallel is not used. It hooks into calls of `forward`, and the flow
is called through several methods. It averages with equal weights, and the batch of a small set may give ranks
unequal shares. And it adds up in every backward pass, of which a step of several micro-batches has many.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import logging
import mmap
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import Tensor, nn
from torch import distributed as dist

from fastflow.errors import OtherProcessError
from fastflow.training import launch
from fastflow.training.config import TrainConfig
from fastflow.training.messages import Messages
from fastflow.training.rows import BatchRows

T = TypeVar("T")
# A collective of a step fails after this time; a rank that waits for files to be read has no limit.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)
_NO_LIMIT = datetime.timedelta(days=365)
_SEED_STEP = 0x9E3779B97F4A7C15


class UnwrappedRanks(DDPStrategy):
    """Ranks as Fabric sets them up, with the model as it is."""

    def setup_module(self, module: nn.Module) -> nn.Module:  # type: ignore[override]
        """The module itself, without a wrapper."""
        return module


class Ranks:
    """The processes that train one model together, as one of them sees them.

    Args:
        fabric: launched.
        precision: that Fabric was made with, to compare settings with; None compares none.

    Attributes:
        fabric: devices, precision and collectives.
        world_size: how many ranks there are.
        rank: of this process, from 0 on.
    """

    def __init__(self, fabric: Fabric, precision: str | None = None) -> None:
        self.fabric, self.precision = fabric, precision
        self.world_size, self.rank = fabric.world_size, fabric.global_rank
        self._calls = 0
        if self.world_size > 1:
            # Objects of the host go through a group of their own, which works without a GPU and waits as
            # long as the first rank reads files.
            self._host = dist.new_group(backend="gloo", timeout=_NO_LIMIT)
            address = os.environ["MASTER_ADDR"]
            self.messages = Messages(address, self.rank, self.world_size, self._broadcast)

    @property
    def is_first(self) -> bool:
        """Whether this rank reads and writes files and talks to the user."""
        return self.rank == 0

    def rows(self, whole: int) -> BatchRows:
        """The rows of a batch of `whole` rows that this rank computes."""
        return BatchRows(self.rank, self.world_size, whole)

    def seed(self, seed: int) -> int:
        """A seed of this rank's own, for numbers that each draws by itself; the first rank's is `seed`."""
        return (seed + self.rank * _SEED_STEP) % 2**63 if self.rank else seed

    def sum(self, values: Tensor) -> Tensor:
        """Add up tensors on the device, in place, to the same bits on all ranks, which all call it."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def highest(self, value: int) -> int:
        """The highest value of all ranks, which must call it together."""
        return max(self.gather(value))

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order; all must call it together."""
        if self.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value, group=self._host)
        return found

    def from_first(self, function: Callable[[], T]) -> T:
        """The result of a function that the first rank alone calls; all must come here.

        The others wait as long as it takes.

        Raises:
            OtherProcessError: the first rank has failed.
        """
        if self.world_size == 1:
            return function()
        self._calls += 1
        name = f"done {self._calls}"
        if self.is_first:
            value = function()
            self.messages.say(name)
            return self._broadcast(value)
        self.messages.wait(name)
        return self._broadcast(cast(T, None))

    def all_parts(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of every rank, (ranks, ...) on the host; all must call it together, with equal shapes."""
        parts = self.gather({name: value.detach().cpu() for name, value in tensors.items()})
        return {name: torch.stack([part[name] for part in parts]) for name in tensors}

    def own_part(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of what `all_parts` gave."""
        # Generators take no state that is a view into other memory.
        return {name: value[self.rank].clone() for name, value in tensors.items()}

    def share_weights(self, model: nn.Module) -> None:
        """Give the model of every rank the parameters and buffers of the first one's."""
        if self.world_size > 1:
            model.load_state_dict(self.from_first(lambda: _on_host(model.state_dict())))

    def _broadcast(self, value: T) -> T:
        values = [_pickled(value) if self.is_first else b""]
        dist.broadcast_object_list(values, src=0, group=self._host)
        return value if self.is_first else cast(T, pickle.loads(values[0]))


class _Pickler(pickle.Pickler):
    """Writes an array that is mapped from a file as the name of the file, which all ranks can read."""

    def reducer_override(self, value: Any) -> Any:
        """How to make the value anew."""
        # NumPy's annotations know no array whose base is a file.
        base: object = getattr(value, "base", None)
        if isinstance(value, np.memmap) and isinstance(base, mmap.mmap):
            return np.memmap, (value.filename, value.dtype, "r", value.offset, value.shape)
        return NotImplemented


def _pickled(value: object) -> bytes:
    file = io.BytesIO()
    _Pickler(file).dump(value)
    return file.getvalue()


def _on_host(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach().cpu() for name, value in state.items()}


def alone(config: TrainConfig, device: str = "auto") -> Ranks:
    """The one rank of a training on one device: ``"auto"``, ``"cpu"`` or ``"cuda"``."""
    precision = _precision(config)
    return Ranks(Fabric(accelerator=device, devices=1, precision=precision), precision)


def _precision(config: TrainConfig) -> Any:
    # Fabric knows no name for the products of float32, which `float32_products` decides.
    return "32-true" if config.precision == "tf32" else config.precision


@contextlib.contextmanager
def joined(config: TrainConfig, device: str = "auto") -> Iterator[Ranks]:
    """Train in the block with as many ranks as the settings ask for, or as torchrun has started.

    Where nobody has started the ranks, this command is started once more for each further device; these
    processes end with the block.

    Args:
        config: `devices`, `num_nodes`, `batch_size` and `accumulate` of it.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.

    Raises:
        ValueError: there are too few devices, or the settings do not fit them; the message names the field.
        OtherProcessError: another rank has failed; the message is its own.
    """
    count, nodes = _counts(config)
    check_share(config, count * nodes)
    if count * nodes == 1:
        yield alone(config, device)
        return
    _check_devices(device, count, config)
    fabric = Fabric(
        accelerator=device,
        devices=count,
        num_nodes=nodes,
        strategy=UnwrappedRanks(timeout=COLLECTIVE_TIMEOUT),
        precision=_precision(config),
    )
    with _started(fabric, count, nodes):
        with _quiet():
            fabric.launch()
        ranks = Ranks(fabric, _precision(config))
        try:
            with ranks.messages.failing_together():
                yield ranks
        except BaseException as error:
            # Others may wait for this rank, and are woken by the end of its connections.
            dist.destroy_process_group()
            if ranks.is_first and not isinstance(error, OtherProcessError):
                ranks.messages.wait_for_others()
            raise
        dist.destroy_process_group()
    if launch.is_started():
        # The rest of the program is for the process that the user started.
        raise SystemExit(0)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A block in which Fabric prints no lines about its connections."""
    logger = logging.getLogger("lightning_fabric")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _started(fabric: Fabric, count: int, nodes: int) -> Iterator[None]:
    environment = fabric.strategy.cluster_environment  # type: ignore[attr-defined]
    if launch.is_started():
        launch.follow_parent()
    elif not environment.creates_processes_externally:
        if nodes > 1 and not {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK"} <= set(os.environ):
            raise ValueError(
                f"num_nodes is {nodes}: set MASTER_ADDR, MASTER_PORT and NODE_RANK on each machine, or start "
                "the training by torchrun"
            )
        with launch.processes(count):
            yield
        return
    yield


def _counts(config: TrainConfig) -> tuple[int, int]:
    """Devices of a machine and machines: those that torchrun has started ranks for, else the settings'."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return config.devices or 1, config.num_nodes
    count = int(os.environ["LOCAL_WORLD_SIZE"])
    nodes = int(os.environ["WORLD_SIZE"]) // count
    if config.devices not in (None, count) or config.num_nodes not in (1, nodes):
        raise ValueError(
            f"devices is {config.devices} on num_nodes {config.num_nodes}, but torchrun has started {count} "
            f"processes on each of {nodes}; leave the settings out, or make them equal"
        )
    return count, nodes


def _check_devices(device: str, count: int, config: TrainConfig) -> None:
    if config.engine == "cuda_graph":
        raise ValueError("engine 'cuda_graph' is for one device; take 'auto' or 'eager' on several")
    found = torch.cuda.device_count()
    if count > found and (device == "cuda" or (device == "auto" and found)):
        raise ValueError(
            f"devices is {count}, but this machine has {found} CUDA devices; take at most so many, or device "
            "'cpu'"
        )


def check_ranks(config: TrainConfig, ranks: Ranks) -> None:
    """Raise ValueError unless the ranks were joined for such a training."""
    check_share(config, ranks.world_size)
    if ranks.precision not in (None, _precision(config)):
        raise ValueError(
            f"precision is {config.precision}, but the ranks were joined with {ranks.precision}; give "
            "`joined` the settings of the training"
        )


def check_share(config: TrainConfig, world_size: int) -> None:
    """Raise ValueError unless ranks and micro-batches share a batch evenly."""
    parts, size = world_size * config.accumulate, config.batch_size
    if size % parts:
        near = sorted({max(parts, size // parts * parts), (size // parts + 1) * parts})
        raise ValueError(
            f"batch_size is {size}, over all devices: it must be a multiple of devices x accumulate = "
            f"{world_size} x {config.accumulate} = {parts}, such as {' or '.join(map(str, near))}"
        )

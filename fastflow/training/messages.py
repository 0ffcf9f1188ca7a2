"""What ranks tell each other beside their collectives: that something is done, or why one has failed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from torch import distributed as dist

# mypy does not see that torch exports it.
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from fastflow.errors import OtherProcessError

# Ranks wait so many seconds for the message of another one that has failed.
MESSAGE_SECONDS = 5.0
# A rank that fails waits so many seconds for the first one to fail in the same way.
_SAME_SECONDS = 2.0
_POLL_SECONDS = 0.05


class Messages:
    """The messages of all ranks, in a store that the first rank keeps until it has ended.

    Args:
        address: of the machine of the first rank.
        rank: this one.
        world_size: how many ranks there are.
        broadcast: gives all ranks the value of the first one.
    """

    def __init__(self, address: str, rank: int, world_size: int, broadcast: Callable[[int], int]) -> None:
        self._rank, self._world_size = rank, world_size
        if rank == 0:
            self._store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
            broadcast(self._store.port)
        else:
            self._store = TCPStore(address, broadcast(0), is_master=False, wait_for_workers=False)

    def say(self, name: str) -> None:
        """Let the others know that something is done."""
        self._store.set(name, "")

    def wait(self, name: str) -> None:
        """Wait until the first rank has said so, as long as it takes.

        Raises:
            OtherProcessError: the first rank has failed.
        """
        while not self._known(name):
            if self._known("error 0"):
                raise self._other(self._error(0))
            time.sleep(_POLL_SECONDS)

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """A block whose error on one rank ends it on all, with the message of that rank.

        Raises:
            OtherProcessError: another rank has failed, or has ended without a message.
        """
        try:
            yield
        except OtherProcessError:
            raise
        except BaseException as error:
            if _is_of_collective(error):
                raise self._other(self._error_of_others()) from error
            self._tell(error)
            raise
        finally:
            with contextlib.suppress(RuntimeError):
                self.say(f"left {self._rank}")

    def wait_for_others(self) -> None:
        """Let the others read the message of this rank, the first, before its store goes."""
        for rank in range(1, self._world_size):
            self._appears(f"left {rank}", MESSAGE_SECONDS)

    def _tell(self, error: BaseException) -> None:
        """Leave the message for the others.

        Raises:
            OtherProcessError: the first rank has failed with the same message, which it prints.
        """
        message = str(error) or type(error).__name__
        with contextlib.suppress(RuntimeError):
            self._store.set(f"error {self._rank}", message)
        first_failed = self._rank > 0 and self._appears("error 0", _SAME_SECONDS)
        if first_failed and self._store.get("error 0").decode() == message:
            raise self._other(message) from error

    def _other(self, message: str) -> OtherProcessError:
        return OtherProcessError(message, self._rank == 0)

    def _error_of_others(self) -> str:
        for rank in self._repeatedly(MESSAGE_SECONDS):
            if self._known(f"error {rank}"):
                return self._error(rank)
        return "another process of the training ended without a message, or did not answer"

    def _repeatedly(self, seconds: float) -> Iterator[int]:
        """The numbers of all ranks, again and again for so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            yield from range(self._world_size)
            time.sleep(_POLL_SECONDS)

    def _appears(self, name: str, seconds: float) -> bool:
        try:
            return any(self._known(name) for _ in self._repeatedly(seconds))
        except OtherProcessError:
            return False

    def _error(self, rank: int) -> str:
        return f"process {rank} of the training stopped: {self._store.get(f'error {rank}').decode()}"

    def _known(self, name: str) -> bool:
        try:
            return bool(self._store.check([name]))
        except RuntimeError as error:
            raise self._other("the first process of the training ended") from error


def _is_of_collective(error: BaseException) -> bool:
    """Whether a collective failed, as it does where another rank is gone or does not answer."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))

"""The processes of a training on several devices of one machine: started, watched, and ended together.

Each is this very command once more, with ``LOCAL_RANK`` and the like in its environment. Lightning Fabric
takes such processes for started by somebody else, and connects them. Its own launcher is not used: it ends
the first process by SIGKILL as soon as another one has failed, before that one can say why, or leave the
folder of the model in order.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping

# A started process finds the id of the one that started it under this name.
PARENT = "FASTFLOW_PARENT"
# A process has so many seconds to notice by itself that another one has failed.
GRACE_SECONDS = 20.0
_POLL_SECONDS = 0.5


def is_started() -> bool:
    """Whether this process was started by `processes`."""
    return PARENT in os.environ


@contextlib.contextmanager
def processes(count: int) -> Iterator[None]:
    """Start the other `count` - 1 processes of this machine, and end them all with the block.

    Raises:
        ValueError: this is an interactive session, which has no command to start once more.
    """
    if hasattr(sys, "ps1") or "ipykernel" in sys.modules:
        raise ValueError(
            f"devices is {count}, but an interactive session cannot be started once more; write a "
            "script, or use `fastflow train --devices` or torchrun"
        )
    with _environment({**_meeting_place(), "LOCAL_RANK": "0"}):
        started = [_start(local_rank) for local_rank in range(1, count)]
        done = threading.Event()
        threading.Thread(target=_watch, args=(started, done), daemon=True).start()
        try:
            yield
        except BaseException:
            done.set()
            _end(started, seconds=5.0)
            raise
        done.set()
        _end(started, seconds=GRACE_SECONDS)


def _meeting_place() -> dict[str, str]:
    """Where the processes find each other, unless the environment says so already."""
    if "MASTER_PORT" in os.environ:
        return {}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in (*values, "MASTER_ADDR", "MASTER_PORT")}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _start(local_rank: int) -> subprocess.Popen[bytes]:
    # Results on standard output are those of the first process.
    return subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]],
        env=os.environ | {"LOCAL_RANK": str(local_rank), PARENT: str(os.getpid())},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )


def _watch(started: list[subprocess.Popen[bytes]], done: threading.Event) -> None:
    """End this process where another one has failed and the main thread goes on waiting for it.

    Its collectives fail by themselves on a CPU; a GPU may leave it waiting.
    """
    while not done.wait(_POLL_SECONDS):
        failed = [(i, process.poll()) for i, process in enumerate(started, start=1) if process.poll()]
        if failed and not done.wait(GRACE_SECONDS):
            number, code = failed[0]
            print(f"error: process {number} of the training ended with code {code}", file=sys.stderr)
            _end(started, seconds=0.0)
            os._exit(1)


def _end(started: list[subprocess.Popen[bytes]], seconds: float) -> None:
    """Wait for processes to end by themselves, and kill those that do not."""
    for process in started:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def follow_parent() -> None:
    """Let this process, which `processes` started, end with its parent, and leave Ctrl-C to that one."""
    parent = int(os.environ[PARENT])
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        pause = threading.Event()
        while os.getppid() == parent:
            pause.wait(_POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

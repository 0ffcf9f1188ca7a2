"""When the state of a training is saved, and what is said of it."""

from __future__ import annotations

import time
from pathlib import Path

from fastflow.training.control import RunControl
from fastflow.training.state import STATE, RunState, write_state

# Saving takes at most this share of the time between two steps' states.
MAX_SAVING_SHARE = 0.05


class StateKeeper:
    """Saves states as often as a `RunControl` asks for.

    Args:
        folder: of the training.
        control: how often.
        found: the state that the training goes on from, if any.
    """

    def __init__(self, folder: Path, control: RunControl, found: RunState | None = None) -> None:
        self._folder, self._control = folder, control
        self._saved = None if found is None else found.where()
        self._last, self._cost, self._steps = time.monotonic(), 0.0, 0

    def due(self) -> bool:
        """Whether a state is to be saved after a step; it must be asked after every step."""
        self._steps += 1
        seconds, steps = self._control.save_seconds, self._control.save_steps
        if steps is not None and self._steps >= steps:
            return True
        waits = None if seconds is None else max(seconds, self._cost / MAX_SAVING_SHARE)
        return waits is not None and time.monotonic() - self._last >= waits

    def save(self, state: RunState) -> None:
        """Write a state.

        Raises:
            OSError: it cannot be written. The state before it is still there.
        """
        start = time.monotonic()
        write_state(self._folder, state)
        self._cost = time.monotonic() - start
        self.note(state)

    def note(self, state: RunState) -> None:
        """Take note of a state that has been written, by another process or by this one."""
        self._last, self._steps, self._saved = time.monotonic(), 0, state.where()

    def what_stays(self) -> str:
        """What there is to go on from, in words."""
        if self._saved is None:
            return "no state had been saved yet: train anew"
        place = self._folder / STATE
        return f"the state of {self._saved} is in {place}, and --resume (resume=True) goes on from there"

    def after_failure(self) -> str:
        """What there is to go on from where the same steps would fail again, in words."""
        if self._saved is None:
            return "no state had been saved yet: train anew with another setting"
        return (
            f"the last good state, of {self._saved}, is in {self._folder / STATE}: go on from it with "
            "another setting by --resume --allow-changes (resume=True, allow_changes=True)"
        )

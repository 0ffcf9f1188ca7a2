"""The count of everything that was found: what is used, and why the rest is left out."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

# So many files of each reason are named.
MAX_EXAMPLES = 5
# The reasons of listings, with what they mean or what to do. Others are the endings of
# `fastflow.data.endings.HINTS`, the codes of `fastflow.data.volume.ERROR_CODES`, and what a command adds.
REASONS = {
    "other": "the ending is none of an image",
    "hidden": "the name begins with a dot",
    "no_content": "a link whose target is missing: fetch it, or remove the link",
    "no_permission": "it may not be listed or read by this user: ask its owner",
    "not_a_file": "a folder or a device with the name of an image",
    "unreadable": "the operating system refuses to list or read it",
    "no_class_folder": "it lies in no class folder: folders are class/file or split/class/file",
    "not_image": "a mask, a segmentation, or another data type of a BIDS dataset",
    "duplicate": "the file was found before under another name, or stands in the manifest twice",
    "no_label": "the class is not known",
    "other_split": "it is not in the split that was asked for",
}


@dataclasses.dataclass
class Inventory:
    """Files that were found, of which some are left out: ``found == used + sum(left_out.values())``.

    Memory: a number and a few names for each reason, however many files there are.

    Attributes:
        used: how many files are used.
        left_out: how many are not, by reason: a short stable identifier such as ``"no_label"``, a code of
            `fastflow.data.volume.ERROR_CODES`, or an ending such as ``".dcm"``.
        examples: the first `MAX_EXAMPLES` files of each reason.
        hints: for some reasons a sentence on what to do.
    """

    used: int = 0
    left_out: Counter[str] = dataclasses.field(default_factory=Counter)
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    hints: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def found(self) -> int:
        """All files."""
        return self.used + self.left_out.total()

    def leave_out(self, reason: str, path: str, hint: str | None = None) -> None:
        """Count a file that is not used."""
        self.left_out[reason] += 1
        named = self.examples.setdefault(reason, [])
        if len(named) < MAX_EXAMPLES:
            named.append(path)
        if hint is not None:
            self.hints[reason] = hint

    def drop(self, reason: str, path: str, hint: str | None = None) -> None:
        """Count a file as left out that was counted as used before."""
        self.used -= 1
        self.leave_out(reason, path, hint)

    def line(self) -> str:
        """One line: ``24 files found: 20 used, 4 left out (no_label 3, .dcm 1)``."""
        files = "file" if self.found == 1 else "files"
        reasons = self.reasons()
        rest = f", {self.left_out.total()} left out ({reasons})" if reasons else ", none left out"
        return f"{self.found} {files} found: {self.used} used{rest}"

    def reasons(self) -> str:
        """The reasons with their counts: ``.dcm 1, no_label 3``."""
        return ", ".join(f"{reason} {count}" for reason, count in sorted(self.left_out.items()))

    def details(self) -> list[str]:
        """A line for each reason: how many, the first of them, and what to do."""
        lines = []
        for reason, count in sorted(self.left_out.items()):
            named = self.examples[reason]
            more = f" and {count - len(named)} more" if count > len(named) else ""
            hint = f" ({self.hints[reason]})" if reason in self.hints else ""
            lines.append(f"{reason} {count}{hint}: {', '.join(named)}{more}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of JSON values."""
        return {
            "found": self.found,
            "used": self.used,
            "left_out": dict(sorted(self.left_out.items())),
            "examples": {reason: list(paths) for reason, paths in sorted(self.examples.items())},
        }

"""The inputs of a run over an archive: a stream of them, never a list. Torch-free."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path

from fastflow.data.bids import is_bids, iterate_bids
from fastflow.data.endings import ENDINGS
from fastflow.data.folders import nothing_below
from fastflow.data.inventory import REASONS, Inventory
from fastflow.data.listing import Listing
from fastflow.data.manifest import ENDINGS_OF_A_MANIFEST, is_manifest, iterate_manifest
from fastflow.data.records import Record, subject_of
from fastflow.data.walk import Passed, walk_files
from fastflow.data.words import split_name
from fastflow.errors import ManifestError

IDS = ("relpath", "hash")
MAX_NAMED_SPLITS = 10
_FILE = f"{', '.join(ENDINGS)} file"


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of the inputs, for one job of many.

    The hash of an input's name says to which part it belongs: parts are disjoint, together they are
    everything, and files that come or go move no other.

    Attributes:
        index: from 1 to `count`.
        count: number of parts.

    Raises:
        ValueError: the index is out of range.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise ValueError(f"shard must be i/N with 1 <= i <= N, got {self}")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def folder(self) -> str:
        """Name of the folder for its results."""
        return f"shard-{self.index:05d}-of-{self.count:05d}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From ``"i/N"``.

        Raises:
            ValueError: the text has another form or the index is out of range.
        """
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
        if match is None:
            raise ValueError(f"shard must be i/N with 1 <= i <= N, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def holds(self, name: str) -> bool:
        """Whether an input of this name is in the part."""
        return int.from_bytes(_digest(name, 8), "big") % self.count == self.index - 1


@dataclasses.dataclass(frozen=True)
class Item:
    """One input.

    Attributes:
        path: the file, absolute or relative to the working directory.
        name: its path relative to the folder or manifest that it came from; the path as it was given where
            there is more than one input.
        label: class name where a manifest knows it.
    """

    path: str
    name: str
    label: str | None = None

    def id(self, kind: str) -> str:
        """The input's identity in results: its name, or 32 hexadecimal digits of the name's BLAKE2b hash."""
        return self.name if kind == "relpath" else _digest(self.name, 16).hex()


def name_bytes(name: str) -> bytes:
    """A file's name as bytes, also one that a manifest can hold and no file system."""
    try:
        return os.fsencode(name)
    except UnicodeEncodeError:
        return name.encode("utf-8", "surrogatepass")


def _digest(name: str, size: int) -> bytes:
    return hashlib.blake2b(name_bytes(name), digest_size=size).digest()


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Files, folders, BIDS datasets and manifests, or a part of them. Iterating lists them anew.

    Attributes:
        sources: files, folders (searched for volumes and PNG files; of a BIDS dataset its anatomical and PET
            images) and manifests (.csv, .tsv, .jsonl). A file that does not exist is an input all the same:
            its row says so.
        split: take only this split of manifests, by any of its names in `fastflow.data.words`.
        shard: take only this part.

    Raises:
        ManifestError: there is no source.
    """

    sources: tuple[str, ...]
    split: str | None = None
    shard: Shard | None = None

    def __post_init__(self) -> None:
        if not self.sources:
            raise ManifestError("nothing to classify: give files, folders or a manifest")

    def __iter__(self) -> Iterator[Item]:
        """The inputs in the order of the sources.

        Raises:
            ManifestError: a folder holds no volume, a manifest cannot be read or has nothing in the split.
        """
        return self.counted(Inventory())

    def counted(self, inventory: Inventory) -> Iterator[Item]:
        """The inputs, and in `inventory` the count of them and of what is left out, as far as they are taken.

        Left out are files that the walk over a folder passes over, by reason, and ``"other_split"``: entries
        of manifests that are not in the split. Of what belongs to another part nothing is counted.

        Raises:
            ManifestError: see `__iter__`.
        """

        def leave_out(reason: str, path: str, hint: str | None = None) -> None:
            if self._holds(self._name(path, base)):
                inventory.leave_out(reason, path, hint)

        for source in self.sources:
            found = False
            base = os.path.dirname(source) if _is_listed(source) else source
            for item in self._items(source, leave_out):
                found = True
                if self._holds(item.name):
                    inventory.used += 1
                    yield item
            if not found:
                raise ManifestError(self._nothing_in(source))

    def check(self) -> None:
        """Look for the first input of each source, so that an empty source is told before any work is done.

        Raises:
            ManifestError: as iterating does.
        """
        for source in self.sources:
            if next(self._items(source, None), None) is None:
                raise ManifestError(self._nothing_in(source))

    def _holds(self, name: str) -> bool:
        return self.shard is None or self.shard.holds(name)

    def _items(self, source: str, passed: Passed | None) -> Iterator[Item]:
        if _is_listed(source):
            base, split = os.path.dirname(source), split_name(self.split)
            for record in iterate_manifest(source):
                if self.split is None or record.split == split:
                    yield Item(record.path, self._name(record.path, base), record.label)
                elif passed is not None:
                    passed("other_split", record.path, REASONS["other_split"])
        elif os.path.isdir(source):
            walk = iterate_bids(source, passed) if is_bids(source) else walk_files(source, passed=passed)
            for path in walk:
                yield Item(path, self._name(path, source))
        else:
            yield Item(source, source)

    def _nothing_in(self, source: str) -> str:
        """The message for a source without inputs, which says what was found instead."""
        left_out, splits = Inventory(), Counter[str]()
        if not _is_listed(source):
            for _ in self._items(source, left_out.leave_out):
                pass
            what = "anatomical or PET image of this BIDS dataset" if is_bids(source) else _FILE
            return nothing_below(source, what, left_out)
        if self.split is None:
            return f"{source}: the manifest has no entries"
        splits.update(record.split or "(none)" for record in iterate_manifest(source))
        there = ", ".join(f"{name} {count}" for name, count in splits.most_common(MAX_NAMED_SPLITS))
        return f"{source}: no entry is in the split {self.split!r}; its splits are {there or 'none'}"

    def _name(self, path: str, base: str) -> str:
        if len(self.sources) > 1 or os.path.isabs(path) != os.path.isabs(base or "."):
            return path
        start = f"{base}/" if base and not base.endswith("/") else base
        # `relpath` gives the same name, and takes far longer than cutting off a prefix.
        plain = path.startswith(start) and ".." not in path
        return path[len(start) :] if plain else os.path.relpath(path, base or ".")


def _is_listed(source: str) -> bool:
    """Whether a source is a manifest; a folder is none, whatever its name."""
    return is_manifest(source) and not os.path.isdir(source)


def inputs_of(
    inputs: Iterable[str | PathLike[str]],
    manifest: str | PathLike[str] | None,
    split: str | None,
    part: Shard | None,
) -> Inputs:
    """The inputs of a run, and one manifest that may be named apart from them.

    Raises:
        ManifestError: there is no source, or the manifest has another ending than a manifest's.
    """
    sources = [os.fspath(path) for path in inputs]
    if manifest is not None:
        if not is_manifest(manifest):
            raise ManifestError(f"{manifest}: {ENDINGS_OF_A_MANIFEST}")
        sources.append(os.fspath(manifest))
    return Inputs(tuple(sources), split, part)


def gather(inputs: Iterable[str | PathLike[str]], split: str | None = None) -> list[Record]:
    """The files that `inputs` mean, as a list, for commands that look at a few.

    Args:
        inputs: see `Inputs`.
        split: take only this split of manifests.

    Raises:
        ManifestError: no input, a folder without files, a manifest that cannot be read or has nothing in the
            split.
    """
    return gather_listing(inputs, split).records


def gather_listing(inputs: Iterable[str | PathLike[str]], split: str | None = None) -> Listing:
    """List files as `gather` does, and count everything that was found.

    Raises:
        ManifestError: as `gather` does.
    """
    sources, inventory = Inputs(tuple(os.fspath(path) for path in inputs), split), Inventory()
    items = sources.counted(inventory)
    return Listing([Record(item.path, item.label, subject_of(Path(item.path))) for item in items], inventory)

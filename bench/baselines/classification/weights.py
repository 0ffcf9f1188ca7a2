"""A user's file of weights into a network of timm: state dicts, also wrapped, and those of RadImageNet."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.baselines._torchvision import import_timm

WRAPPERS = ("state_dict", "model")
PREFIXES = ("module.", "backbone.")
# RadImageNet's files name a network's children by number; their order is that of torchvision, and of timm.
BY_ORDER = ("resnet50", "densenet121", "inception_v3")
# Counters of batches say nothing where all statistics are given; some files lack them.
COUNTER = "num_batches_tracked"
_NUMBERED = re.compile(r"\d+\.")
# A message names so many keys at most.
MAX_NAMED = 5


@dataclasses.dataclass(frozen=True)
class Loaded:
    """The entries of a file of weights that a network took, and those it did not.

    Attributes:
        entries: how many entries of the network come from the file.
        unexpected: entries of the file that the network has no place for.
        missing: entries of the classifier, which keep their random values.
    """

    entries: int
    unexpected: tuple[str, ...]
    missing: tuple[str, ...]

    def line(self) -> str:
        """The counts in words, with the first names."""
        parts = [f"{self.entries} entries loaded"]
        for text, names in (("unexpected", self.unexpected), ("left at random values", self.missing)):
            if names:
                parts.append(f"{len(names)} {text} ({_named(names)})")
        return "; ".join(parts)


def load_weights(model: nn.Module, file: str | Path, name: str) -> Loaded:
    """Fill a network from a file; the classifier keeps its random weights where the file's does not fit.

    The first convolution of a file for RGB is summed over its channels, since a grey image is one with three
    equal channels. Position embeddings of another image size are resampled.

    Args:
        model: of timm, for images with one channel; changed in place.
        file: a state dict of ``torch.save`` or safetensors, also inside ``state_dict`` or ``model``.
        name: of the network, in `fastflow`'s list of rivals.

    Raises:
        ValueError: the file lacks an entry of the trunk, or one has another shape; the message names some.
        OSError: the file cannot be read.
    """
    given = read_state(file)
    own = model.state_dict()
    head = _head_of(model)
    if given and all(_NUMBERED.match(key) for key in given):
        given = by_order(given, own, head, name, str(file))
    fitted = {
        key: _fit(model, key, value, own[key])
        for key, value in given.items()
        if key in own and not key.endswith(COUNTER)
    }
    wrong = [
        key for key, value in fitted.items() if value.shape != own[key].shape and not _is_head(key, head)
    ]
    wanted = [key for key in own if not key.endswith(COUNTER)]
    lacking = [key for key in wanted if key not in fitted and not _is_head(key, head)]
    if wrong:
        shapes = ", ".join(f"{k} {_shape(given[k])} for {_shape(own[k])}" for k in wrong[:MAX_NAMED])
        raise ValueError(f"{file}: {len(wrong)} entries have other shapes than those of {name}: {shapes}")
    if lacking:
        raise ValueError(
            f"{file}: {len(lacking)} entries of {name} are missing: {_named(lacking)}; "
            f"the file has {len(given)} entries, such as {_named(list(given)[:2])}"
        )
    used = {key: value for key, value in fitted.items() if value.shape == own[key].shape}
    model.load_state_dict(used, strict=False)
    unexpected = tuple(k for k in given if k not in own and not k.endswith(COUNTER))
    return Loaded(len(used), unexpected, tuple(k for k in wanted if k not in used))


def read_state(file: str | Path) -> dict[str, Tensor]:
    """The tensors of a file by their names, without wrappers and without the prefixes of `PREFIXES`.

    Raises:
        ValueError: the file holds no tensors.
        OSError: it cannot be read.
    """
    if str(file).endswith(".safetensors"):
        from safetensors.torch import load_file

        content = load_file(file)
    else:
        content = torch.load(file, map_location="cpu", weights_only=True)
    while isinstance(content, Mapping) and (
        inner := [w for w in WRAPPERS if isinstance(content.get(w), Mapping)]
    ):
        content = content[inner[0]]
    tensors = (
        {key: value for key, value in content.items() if isinstance(value, Tensor)}
        if isinstance(content, Mapping)
        else {}
    )
    if not tensors:
        raise ValueError(
            f"{file}: must hold a state dict, alone or under {' or '.join(WRAPPERS)}, "
            f"got {type(content).__name__} without tensors"
        )
    return {_without_prefixes(key): value for key, value in tensors.items()}


def by_order(
    given: Mapping[str, Tensor], own: Mapping[str, Tensor], head: Sequence[str], name: str, file: str
) -> dict[str, Tensor]:
    """Entries that are named by a child's number, under the names of a network, by their order.

    Args:
        given: entries of the file, in its order.
        own: entries of the network, in its order.
        head: names of the classifier's modules.
        name: of the network.
        file: for messages.

    Raises:
        ValueError: no such file is known for the network, or counts or shapes differ.
    """
    if name not in BY_ORDER:
        raise ValueError(
            f"{file}: names children by number, which is known for {', '.join(BY_ORDER)} only, not {name}"
        )
    trunk = [key for key in own if not _is_head(key, head) and not key.endswith(COUNTER)]
    values = {key: value for key, value in given.items() if not key.endswith(COUNTER)}
    if len(values) != len(trunk):
        raise ValueError(
            f"{file}: has {len(values)} numbered entries, {name} has {len(trunk)} without its classifier"
            + ("; a file with the auxiliary head does not fit" if len(values) > len(trunk) else "")
        )
    for key, (theirs, value) in zip(trunk, values.items(), strict=True):
        # The first convolution may be for RGB.
        same = value.shape == own[key].shape or value.shape[2:] == own[key].shape[2:] == (*value.shape[2:],)
        if not same or value.shape[:1] != own[key].shape[:1] or theirs.split(".")[-1] != key.split(".")[-1]:
            raise ValueError(
                f"{file}: entry {theirs} {_shape(value)} does not fit {key} {_shape(own[key])} of {name}"
            )
    return dict(zip(trunk, values.values(), strict=True))


def _fit(model: nn.Module, key: str, value: Tensor, own: Tensor) -> Tensor:
    """A value in the form that the network has for it, where one is known; otherwise as it is."""
    if value.shape == own.shape:
        return value
    if value.ndim == own.ndim == 4 and own.shape[1] == 1 and value.shape[1] == 3:
        return value.float().sum(dim=1, keepdim=True)
    if key.endswith("pos_embed") and value.ndim == own.ndim == 3 and value.shape[2] == own.shape[2]:
        resample = import_timm().layers.resample_abs_pos_embed
        grid = model.patch_embed.grid_size
        return resample(value, new_size=list(grid), num_prefix_tokens=model.num_prefix_tokens)
    return value


def _head_of(model: nn.Module) -> tuple[str, ...]:
    names = getattr(model, "default_cfg", {}).get("classifier", ())
    return (names,) if isinstance(names, str) else tuple(names)


def _is_head(key: str, head: Sequence[str]) -> bool:
    return any(key.startswith(f"{name}.") for name in head)


def _without_prefixes(key: str) -> str:
    while any(key.startswith(prefix) for prefix in PREFIXES):
        key = key.partition(".")[2]
    return key


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "scalar"

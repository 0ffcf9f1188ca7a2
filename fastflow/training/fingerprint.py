"""What must be equal where a training is resumed: settings, architecture, preprocessing and data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fastflow.data.slices import SliceSet
from fastflow.models.magic_flow import MagicFlow
from fastflow.training.config import TrainConfig

# These settings decide when a training gives up, and how its ranks, whose number is compared, are started.
INDIFFERENT = ("max_skipped", "devices", "num_nodes")
# These may differ where it was asked for: the state has the same tensors, and the order of images stays.
CHANGEABLE = (
    *("epochs", "learning_rate", "warmup_epochs", "min_learning_rate", "clip_norm"),
    *("objective", "contrast_weight", "contrast_temperature", "schedule", "augment"),
    *("select", "select_tolerance", "calibration_volumes", "accumulate"),
)
DIGEST_BYTES = 16

Fingerprint = dict[str, Any]


def settings_fingerprint(config: TrainConfig) -> Fingerprint:
    """The settings of a training that decide its result."""
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in INDIFFERENT}
    return {"settings": _as_json(fields)}


def architecture_fingerprint(model: MagicFlow) -> Fingerprint:
    """The architecture and its masks."""
    digest = _new_digest()
    for name, value in model.state_dict().items():
        if name.endswith(".mask"):
            digest.update(np.packbits(value.cpu().numpy()).tobytes())
    architecture = model.config.to_dict() | {"masks_digest": digest.hexdigest()}
    return {"architecture": _as_json(architecture)}


def preprocess_fingerprint(model: MagicFlow) -> Fingerprint:
    """The preprocessing that the metadata of a model name, if they do."""
    return {"preprocess": _as_json(model.metadata.get("preprocess", {}))}


def ranks_fingerprint(world_size: int) -> Fingerprint:
    """The number of ranks, each of which has generators of its own."""
    return {"ranks": {"ranks": world_size}}


def data_fingerprint(sets: Mapping[str, SliceSet]) -> Fingerprint:
    """The slices of each set, volume by volume; where the files lie is no part of it but for messages."""
    return {"data": {name: _set_fingerprint(data) for name, data in sets.items()}}


def _set_fingerprint(data: SliceSet) -> dict[str, Any]:
    digests = [_new_digest() for _ in data.paths]
    for image, label, volume in zip(data.images, data.labels, data.volumes, strict=True):
        digests[volume].update(b"%d " % label)
        digests[volume].update(np.ascontiguousarray(image).tobytes())
    order = _new_digest()
    order.update(np.ascontiguousarray(data.volumes).tobytes())
    return {
        "classes": list(data.class_names),
        "slices": len(data),
        "order_of_slices": order.hexdigest(),
        "volumes": [[path, digest.hexdigest()] for path, digest in zip(data.paths, digests, strict=True)],
    }


def _new_digest() -> Any:
    return hashlib.blake2b(digest_size=DIGEST_BYTES)


def _as_json(value: Any) -> Any:
    """A value as it is read back from a JSON file."""
    return json.loads(json.dumps(value))


def differences(before: Fingerprint, now: Fingerprint) -> list[str]:
    """What differs between two trainings, in words, such as ``epochs was 10 and is now 20``.

    Groups that `now` lacks are not compared.
    """
    found: list[str] = []
    defaults = _as_json(dataclasses.asdict(TrainConfig()))
    for group in ("settings", "architecture", "preprocess", "ranks"):
        if group in now:
            earlier = (defaults if group == "settings" else {}) | before[group]
            found += _changes(earlier, now[group])
    for name in sorted({*before["data"], *now["data"]} if "data" in now else ()):
        found += _data_changes(name, before["data"].get(name), now["data"].get(name))
    return found


def changed_settings(before: Fingerprint, now: Fingerprint) -> list[str]:
    """The `CHANGEABLE` settings that differ, in words."""
    old, new = ({k: v for k, v in f["settings"].items() if k in CHANGEABLE} for f in (before, now))
    return list(_changes(_as_json(dataclasses.asdict(TrainConfig())) | old, new))


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in now:
        if name not in before:
            yield f"{name} was not set and is now {now[name]!r}"
        elif before[name] != now[name]:
            yield f"{name} was {before[name]!r} and is now {now[name]!r}"


def _data_changes(name: str, before: Any, now: Any) -> Iterator[str]:
    if before is None or now is None:
        was, is_now = ("not given", "given") if before is None else ("given", "not given")
        yield f"a set {name!r} was {was} and is now {is_now}"
        return
    if before["classes"] != now["classes"]:
        yield f"the classes of {name!r} were {before['classes']} and are now {now['classes']}"
    yield from _volume_changes(name, before["volumes"], now["volumes"])
    for key in ("slices", "order_of_slices"):
        if before[key] != now[key]:
            yield f"{key} of {name!r} was {before[key]} and is now {now[key]}"


def _volume_changes(
    name: str, before: Sequence[Sequence[str]], now: Sequence[Sequence[str]]
) -> Iterator[str]:
    """The number of volumes where it differs, and else the first whose slices or label do."""
    if len(before) != len(now):
        paths, new_paths = ({path for path, _ in volumes} for volumes in (before, now))
        odd = sorted(new_paths - paths or paths - new_paths)
        example = f" ({'new' if new_paths - paths else 'gone'}: {odd[0]})" if odd else ""
        yield f"volumes of {name!r} were {len(before)} and are now {len(now)}{example}"
        return
    wrong = [i for i in range(len(now)) if before[i][1] != now[i][1]]
    if not wrong:
        return
    (old_path, old), (path, new) = before[wrong[0]], now[wrong[0]]
    which = path if path == old_path else f"{old_path}, now {path}"
    yield (
        f"slices or labels of {len(wrong)} of {len(now)} volumes of {name!r} differ; the first is {which} "
        f"(digest was {old[:8]} and is now {new[:8]})"
    )

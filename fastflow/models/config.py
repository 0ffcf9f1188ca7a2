"""The architecture of a MAGIC-Flow model: a frozen, validated description with presets and a JSON form."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, Literal

Shape = tuple[int, int, int]
Widths = tuple[int, int, int]

MASKS = ("custom", "checkerboard", "channel", "vertical_stripe", "horizontal_stripe", "block_checkerboard")
TASKS = ("classification", "generation")
NORMS = ("group", "batch")
DEQUANTIZE = ("none", "uniform")


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """Architecture of a flow: one entry of `masks` and of `widths` per flow step.

    Attributes:
        num_classes: K, the number of labels.
        input_shape: (C, H, W) of the image.
        task: ``"classification"`` (strided conditioner with dense heads) or ``"generation"`` (full-resolution
            conditioner).
        masks: name of each step's mask, one of `MASKS`.
        squeeze_before: steps before which 2x2 blocks of pixels move into channels.
        split_after: steps after which the second half of the channels leaves as latent.
        widths: (f1, f2, f3), the channels of the conditioner's three stages, per step.
        share_halves: one conditioner serves both halves of a step (the published form); False builds two.
        scale_bound: b; each log-scale lies in (-b, b).
        dropout: probability in the classification conditioner (the generation conditioner has none).
        condition_from_step: first step whose conditioner sees the label; the steps before it are label-free.
        reversible: train in activation memory that does not grow with the steps of a scale, for one more
            evaluation of every conditioner (`fastflow.models.reversible`); results stay the same.
        norm: ``"group"``, or ``"batch"`` for BatchNorm in the generation conditioner's residual blocks
            (published weights).
        block_size: edge, in pixels, of the blocks of the ``"block_checkerboard"`` mask.
        class_names: K distinct names, or None.
        dequantize: ``"uniform"`` adds uniform noise of one 8-bit grey level to training images and when
            bits/dim are measured.

    Raises:
        ValueError: an inconsistent combination; the message names the field, its value and what would fit.

    Source: MAGIC-Flow (Caldera, Bottacini, Cavinato; arXiv 2510.22070).
    """

    num_classes: int
    input_shape: Shape
    task: Literal["classification", "generation"] = "classification"
    masks: tuple[str, ...] = ()
    squeeze_before: tuple[int, ...] = ()
    split_after: tuple[int, ...] = ()
    widths: tuple[Widths, ...] = ()
    share_halves: bool = True
    scale_bound: float = 0.5
    dropout: float = 0.3
    condition_from_step: int = 0
    reversible: bool = False
    norm: Literal["group", "batch"] = "group"
    block_size: int = 2
    class_names: tuple[str, ...] | None = None
    dequantize: Literal["none", "uniform"] = "none"

    def __post_init__(self) -> None:
        for name in ("input_shape", "masks", "squeeze_before", "split_after", "class_names"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _as_tuple(name, value))
        object.__setattr__(
            self, "widths", tuple(_as_tuple("widths", w) for w in _as_tuple("widths", self.widths))
        )
        _check_choices(self)
        _check_numbers(self)
        _check_steps(self)
        _walk_shapes(self)

    # -- derived from the fields ------------------------------------------------------------------------

    @property
    def num_steps(self) -> int:
        """Number of flow steps."""
        return len(self.masks)

    @property
    def num_dims(self) -> int:
        """D = C*H*W, the number of elements of an image and of its latent."""
        c, h, w = self.input_shape
        return c * h * w

    @property
    def step_shapes(self) -> tuple[Shape, ...]:
        """(C, H, W) that each step transforms (after its squeeze)."""
        return _walk_shapes(self)[0]

    @property
    def latent_shapes(self) -> tuple[Shape, ...]:
        """(C, H, W) of each latent block in the order of the latent: the final block, then the splits."""
        return _walk_shapes(self)[1]

    # -- JSON ------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of JSON values; `from_dict` is its inverse."""
        return {key: _as_lists(value) for key, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FlowConfig:
        """Build a configuration from `to_dict`'s form.

        Raises:
            ValueError: an unknown field, a missing one, or an inconsistent combination.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown configuration field(s) {unknown}; known fields are {sorted(known)}")
        missing = sorted({"num_classes", "input_shape", "masks", "widths"} - set(values))
        if missing:
            raise ValueError(f"missing configuration field(s) {missing}")
        return cls(**values)

    # -- presets ---------------------------------------------------------------------------------------------

    @classmethod
    def paper(
        cls,
        num_classes: int,
        task: Literal["classification", "generation"] = "classification",
        **changes: Any,
    ) -> FlowConfig:
        """The published layout: 24 steps on 1x184x184 (182x182 at 1 mm, padded).

        151.6 M parameters for classification at K = 7. `changes` replace single fields.
        """
        values: dict[str, Any] = {
            "input_shape": (1, 184, 184),
            "masks": (
                "custom",
                *["checkerboard"] * 4,
                *(["channel"] * 3 + ["checkerboard"] * 3) * 2,
                *["channel"] * 3,
            )
            + ("checkerboard",) * 4,
            "squeeze_before": (5, 11, 17),
            "split_after": (7, 13, 19),
            "widths": ((16, 16, 32),) * 2
            + ((16, 32, 32),) * 4
            + ((16, 32, 64),) * 4
            + ((16, 64, 64),)
            + ((32, 64, 64),) * 3
            + ((32, 64, 128),) * 3
            + ((64, 64, 128),) * 3
            + ((64, 128, 128),) * 2
            + ((128, 256, 256),) * 2,
        }
        return cls(num_classes=num_classes, task=task, **{**values, **changes})

    @classmethod
    def small(
        cls,
        num_classes: int,
        task: Literal["classification", "generation"] = "classification",
        **changes: Any,
    ) -> FlowConfig:
        """A layout for CPUs: 14 steps on 1x96x96 (the 91x91 coronal slice of the 2 mm grid, padded)."""
        values: dict[str, Any] = {
            "input_shape": (1, 96, 96),
            "masks": ("custom", "checkerboard") + (("channel",) * 2 + ("checkerboard",) * 2) * 3,
            "squeeze_before": (2, 6, 10),
            "split_after": (4, 8, 12),
            "widths": ((16, 16, 32),) * 6 + ((16, 32, 32),) * 4 + ((32, 32, 64),) * 4,
        }
        return cls(num_classes=num_classes, task=task, **{**values, **changes})

    @classmethod
    def demo(
        cls,
        num_classes: int,
        task: Literal["classification", "generation"] = "classification",
        **changes: Any,
    ) -> FlowConfig:
        """A layout that converges in minutes on two cores: 12 steps on 1x96x96, squeezed at once.

        Two early squeezes leave 16 channels of 24x24: the 1x1 convolutions learn a transform of 4x4 blocks,
        in whose bands the grain of noise and the point spread of a scanner show. Dequantised, so that
        densities of padding stay bounded.
        """
        values: dict[str, Any] = {
            "input_shape": (1, 96, 96),
            "masks": ("custom", "checkerboard", "channel", "checkerboard") + ("channel", "checkerboard") * 4,
            "squeeze_before": (0, 1, 6),
            "split_after": (5, 8),
            "widths": ((16, 16, 32),) * 12,
            "dropout": 0.0,
            "dequantize": "uniform",
        }
        return cls(num_classes=num_classes, task=task, **{**values, **changes})

    @classmethod
    def tiny(
        cls,
        num_classes: int,
        task: Literal["classification", "generation"] = "classification",
        **changes: Any,
    ) -> FlowConfig:
        """A layout for tests: 6 steps on 1x16x16."""
        values: dict[str, Any] = {
            "input_shape": (1, 16, 16),
            "masks": ("custom", "checkerboard", "channel", "checkerboard", "channel", "checkerboard"),
            "squeeze_before": (1, 4),
            "split_after": (3,),
            "widths": ((8, 8, 8),) * 6,
        }
        return cls(num_classes=num_classes, task=task, **{**values, **changes})

    @classmethod
    def preset(cls, name: str, num_classes: int, **changes: Any) -> FlowConfig:
        """A preset by name, one of `PRESETS`.

        Raises:
            ValueError: the name is not one of them.
        """
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        built: FlowConfig = getattr(cls, name)(num_classes, **changes)
        return built


PRESETS = ("paper", "small", "demo", "tiny")


def _as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise ValueError(f"{name} must be a sequence, got {value!r}")
    return tuple(v.item() if hasattr(v, "item") else v for v in value)


def _as_lists(value: Any) -> Any:
    return [_as_lists(v) for v in value] if isinstance(value, tuple) else value


def _is_int(value: Any, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _check_choices(config: FlowConfig) -> None:
    for name, allowed in (("task", TASKS), ("norm", NORMS), ("dequantize", DEQUANTIZE)):
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(config, name)!r}")
    for i, mask in enumerate(config.masks):
        if mask not in MASKS:
            raise ValueError(f"masks[{i}] must be one of {', '.join(MASKS)}, got {mask!r}")
    if config.norm == "batch" and config.task != "generation":
        raise ValueError(
            "norm='batch' belongs to the residual blocks of task='generation'; use norm='group' for "
            "classification"
        )
    if config.reversible and config.norm == "batch":
        raise ValueError(
            "reversible=True needs norm='group': the batch statistics of norm='batch' cannot be replayed"
        )


def _check_numbers(config: FlowConfig) -> None:
    if not _is_int(config.num_classes, 1):
        raise ValueError(f"num_classes must be an integer of at least 1, got {config.num_classes!r}")
    if len(config.input_shape) != 3 or not all(_is_int(n, 1) for n in config.input_shape):
        raise ValueError(f"input_shape must be three positive integers (C, H, W), got {config.input_shape!r}")
    if not config.scale_bound > 0:
        raise ValueError(f"scale_bound must be positive, got {config.scale_bound!r}")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {config.dropout!r}")
    if not _is_int(config.block_size, 1):
        raise ValueError(f"block_size must be an integer of at least 1, got {config.block_size!r}")
    names = config.class_names
    if names is not None and (len(names) != config.num_classes or len(set(names)) != len(names)):
        raise ValueError(
            f"class_names must be {config.num_classes} distinct names (num_classes), got {list(names)!r}"
        )


def _check_steps(config: FlowConfig) -> None:
    steps = config.num_steps
    if steps == 0:
        raise ValueError("masks must name at least one flow step, got none")
    if len(config.widths) != steps:
        raise ValueError(
            f"widths must have one (f1, f2, f3) per step, {steps} in all (len(masks)), got "
            f"{len(config.widths)}"
        )
    for i, widths in enumerate(config.widths):
        if len(widths) != 3 or not all(_is_int(n, 1) for n in widths):
            raise ValueError(f"widths[{i}] must be three positive integers (f1, f2, f3), got {widths!r}")
    for name in ("squeeze_before", "split_after"):
        indices = getattr(config, name)
        bad = [i for i in indices if not _is_int(i, 0) or i >= steps]
        if bad:
            raise ValueError(
                f"{name} must hold step indices from 0 to {steps - 1} (len(masks) is {steps}), got {bad[0]!r}"
            )
        if list(indices) != sorted(set(indices)):
            raise ValueError(f"{name} must be ascending without repeats, got {list(indices)!r}")
    if not _is_int(config.condition_from_step, 0) or config.condition_from_step >= steps:
        raise ValueError(
            f"condition_from_step must be a step index from 0 to {steps - 1}, got "
            f"{config.condition_from_step!r}"
        )


def _walk_shapes(config: FlowConfig) -> tuple[tuple[Shape, ...], tuple[Shape, ...]]:
    """The shape of every step and of every latent block; ValueError where a squeeze or split does not fit."""
    c, h, w = config.input_shape
    steps, splits = [], []
    for i in range(config.num_steps):
        if i in config.squeeze_before:
            if h % 2 or w % 2:
                raise ValueError(
                    f"squeeze_before={list(config.squeeze_before)}: step {i} would squeeze {c}x{h}x{w}, "
                    "but both sides must "
                    f"be even; input_shape {config.input_shape} must be divisible by 2 once per squeeze"
                )
            c, h, w = 4 * c, h // 2, w // 2
        steps.append((c, h, w))
        if i in config.split_after:
            if c % 2:
                raise ValueError(
                    f"split_after={list(config.split_after)}: step {i} has {c} channel(s), but only an "
                    "even number can be split; "
                    "put a squeeze before it"
                )
            c //= 2
            splits.append((c, h, w))
    return tuple(steps), tuple(itertools.chain([(c, h, w)], splits))

"""The networks by the names that timm has for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from bench.baselines._torchvision import import_timm


@dataclasses.dataclass(frozen=True)
class Network:
    """A network of timm.

    Attributes:
        text: its name in the literature.
        has_size: its tokens or windows are made for one image size, which it must be told.
        least: the smallest image side that it takes.
        options: further arguments of ``timm.create_model``.
    """

    text: str
    has_size: bool = False
    least: int = 32
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


NETWORKS: dict[str, Network] = {
    "resnet50": Network("ResNet-50"),
    "densenet121": Network("DenseNet-121"),
    # The auxiliary head is left out, as no weights of RadImageNet have it.
    "inception_v3": Network("InceptionV3", least=75, options={"aux_logits": False}),
    "inception_resnet_v2": Network("Inception-ResNet-v2", least=75),
    "vit_base_patch32_224": Network("ViT-B/32", True),
    "vit_base_r50_s16_224": Network("ViT-ResNet/16", True),
    "swin_base_patch4_window7_224": Network("Swin-B", True),
    "swin_tiny_patch4_window7_224": Network("Swin-T", True),
    # These are small enough for a CPU.
    "resnet18": Network("ResNet-18"),
    "vit_tiny_patch16_224": Network("ViT-Ti/16", True),
    "vit_tiny_r_s16_p8_224": Network("ViT-Ti-ResNet/16", True),
}


def build(name: str, classes: int, size: tuple[int, int]) -> nn.Module:
    """A network with random weights for images (B, 1, H, W).

    Args:
        name: in `NETWORKS`.
        classes: K.
        size: (H, W).

    Raises:
        ValueError: there is no such network, or the images are too small for it.
        ImportError: timm is not installed.
    """
    if name not in NETWORKS:
        raise ValueError(f"name must be one of {', '.join(NETWORKS)}, got {name!r}")
    network = NETWORKS[name]
    if min(size) < network.least:
        raise ValueError(f"{name} takes images of at least {network.least} pixels a side, got {size}")
    sized = {"img_size": size} if network.has_size else {}
    return import_timm().create_model(
        name, pretrained=False, num_classes=classes, in_chans=1, **network.options, **sized
    )

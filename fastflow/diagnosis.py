"""The state of a machine: versions of fastflow and its dependencies, device, implementation of each op."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from importlib import metadata

import fastflow

MISSING = "missing"
# These extras hold tools of developers, not features.
TOOL_EXTRAS = ("dev",)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_EXTRA = re.compile(r"""extra\s*==\s*["']([^"']+)["']""")


def diagnose() -> dict[str, str]:
    """Names and values for people: versions, device, backend. An absent required package is "missing"."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {
        "fastflow": fastflow.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "cpu cores": str(cores),
    }
    packages = {name: _version(name, otherwise) for name, otherwise in dependencies().items()}
    facts |= {name: packages.pop(name) for name in ("torch", "triton") if name in packages}
    if facts.get("torch", MISSING) != MISSING:
        facts |= _device()
    return facts | packages


def dependencies() -> Mapping[str, str]:
    """Every package that the metadata of the installed fastflow names, with the words for its absence.

    A package is "missing" where it is always required. One that only some platforms have is "not installed",
    and one that a feature asks for is "not installed (optional)". Required ones come first.
    """
    try:
        requirements = metadata.requires("fastflow") or []
    except metadata.PackageNotFoundError:
        # A checkout that is not installed has no metadata; nothing works without torch.
        requirements = ["torch"]
    required: dict[str, str] = {}
    optional: dict[str, str] = {}
    for requirement in requirements:
        text, _, marker = requirement.partition(";")
        name, extra = _NAME.match(text.strip()), _EXTRA.search(marker)
        if name is None or (extra and extra[1] in TOOL_EXTRAS):
            continue
        if extra:
            optional[name[0]] = "not installed (optional)"
        else:
            required[name[0]] = "not installed" if marker.strip() else MISSING
    return required | {name: words for name, words in optional.items() if name not in required}


def _version(name: str, otherwise: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return otherwise


def _device() -> dict[str, str]:
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        device = f"{properties.name}, {memory}, {torch.cuda.device_count()} in all"
    else:
        device = "no GPU that torch can use; models run on the CPU"
    return {
        "torch threads": str(torch.get_num_threads()),
        "torch built for": f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"HIP {torch.version.hip}"
        if torch.version.hip
        else "CPU",
        "device": device,
    } | _ops("cuda" if torch.cuda.is_available() else "cpu")


def _ops(device: str) -> dict[str, str]:
    """The implementation of each op that runs on the machine's best device, and the reason for it."""
    from fastflow.kernels.registry import OPS, explain, get_backend

    source = " (from FASTFLOW_BACKEND)" if os.environ.get("FASTFLOW_BACKEND") else ""
    implementation, why = explain(device)
    facts = {"backend": get_backend() + source}
    for op in OPS.values():
        limit = f"; {op.limit}" if op.limit and implementation == "triton" else ""
        text = (
            f"{implementation}: {why}{limit}" if op.triton else "reference: no Triton kernel in this version"
        )
        facts |= {f"op {function}": text for function in op.functions}
    return facts

"""What fastflow finds on a machine."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import fastflow

DEPENDENCIES = (
    "numpy", "scipy", "scikit-learn", "nibabel", "pillow", "safetensors", "lightning-fabric", "torchmetrics",
    "matplotlib", "jinja2", "typer", "rich",
)  # fmt: skip
OPTIONAL = ("onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu")


def diagnose() -> dict[str, str]:
    """Names and values for people: versions, device, backend. A required package that is not there is "missing"."""
    facts = {
        "fastflow": fastflow.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "cpu cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "torch": _version("torch", "missing"),
        "triton": _version("triton", "not installed"),
    }
    if facts["torch"] != "missing":
        facts |= _device()
    facts |= {name: _version(name, "missing") for name in DEPENDENCIES}
    return facts | {name: _version(name, "not installed (optional)") for name in OPTIONAL}


def _version(name: str, otherwise: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return otherwise


def _device() -> dict[str, str]:
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {torch.cuda.device_count()} in all"
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
    """Which implementation of each op runs on the machine's best device, and why."""
    from fastflow import kernels
    from fastflow.kernels import _library
    from fastflow.kernels.channel_mix import MAX_CHANNELS

    source = " (from FASTFLOW_BACKEND)" if os.environ.get("FASTFLOW_BACKEND") else ""
    implementation, why = _library.explain(device)
    facts = {"backend": kernels.get_backend() + source}
    for op in _library.OPS_WITH_KERNELS:
        limit = f"; above {MAX_CHANNELS} channels a batched matrix product" if op.startswith("channel_") else ""
        facts[f"op {op}"] = f"{implementation}: {why}{limit if implementation == 'triton' else ''}"
    for op in _library.OPS_WITHOUT_KERNELS:
        facts[f"op {op}"] = "reference: no Triton kernel in this version"
    return facts

"""Packaging; tool settings are in pyproject.toml, the versions that are tested in constraints.txt."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """`fastflow.__version__`, read without importing the package."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "fastflow" / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise RuntimeError("fastflow/__init__.py has no __version__")
    return found[1]


PARQUET = ["pyarrow>=15"]
RAY = ["ray[data]>=2.40"]
ONNX = ["onnx>=1.19", "onnx-ir>=0.1.12", "onnxscript>=0.5"]
EXPORT_CPU = [*ONNX, "onnxruntime>=1.20"]

setup(
    name="fastflow",
    version=version(),
    description="Fused normalizing-flow kernels and MAGIC-Flow, a class-conditional multiscale flow for brain-scan slices",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "fastflow/data/assets/LICENCES.md"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["fastflow", "fastflow.*"]), "fastflow.export"],
    package_dir={"fastflow.export": "export"},
    package_data={"fastflow": ["py.typed"], "fastflow.data": ["assets/**"], "fastflow.evaluation": ["templates/*"]},
    install_requires=[
        "torch>=2.6",
        'triton>=3.2; platform_system == "Linux" and platform_machine == "x86_64"',
        "numpy>=1.26",
        "scipy>=1.11",
        "scikit-learn>=1.4",
        "nibabel>=5.2",
        # Inflates two to three times as fast as the standard library, which takes its place where there is no wheel.
        'isal>=1.7; platform_machine in "x86_64 AMD64 aarch64 arm64"',
        "pillow>=10.0",
        "safetensors>=0.4",
        "lightning-fabric>=2.4",
        "torchmetrics>=1.4",
        "matplotlib>=3.8",
        "jinja2>=3.1",
        "typer>=0.15",
        "rich>=13.7",
    ],
    extras_require={
        "dev": [
            *("build", "setuptools>=77", "hypothesis", "mypy", "pytest>=8", "pytest-benchmark", "pytest-xdist", "ruff"),
            # The schema of what a model repository holds; its gRPC extra would pin an old protobuf.
            "tritonclient>=2.69",
            *(*PARQUET, *RAY, *EXPORT_CPU),
        ],
        "parquet": PARQUET,
        "ray": RAY,
        "export": [*ONNX, "onnxruntime-gpu>=1.20"],
        "export-cpu": EXPORT_CPU,
    },
    entry_points={"console_scripts": ["fastflow = fastflow.cli.main:run"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Image Processing",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
)

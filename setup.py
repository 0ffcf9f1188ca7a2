"""Packaging; tool settings are in pyproject.toml, the versions that are tested in constraints.txt."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """`fastflow.__version__`, read without importing the package."""
    found = re.search(
        r'^__version__ = "(.+)"$',
        (ROOT / "fastflow" / "__init__.py").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    if found is None:
        raise RuntimeError("fastflow/__init__.py has no __version__")
    return found[1]


# `fastflow doctor` reads these lists from the metadata of the installed package.
CORE = [
    # Tensors, gradients and the model itself.
    "torch>=2.6",
    # The kernels of the ops on GPUs; elsewhere their CPU forms run.
    'triton>=3.2; platform_system == "Linux" and platform_machine == "x86_64"',
    # Volumes, slices and results outside of the model.
    "numpy>=1.26",
    # Deformations of the demo's heads, the fit of the temperature, smoothed pictures.
    "scipy>=1.11",
    # Logistic regression with cross-validation, for the histogram baseline beside every accuracy.
    "scikit-learn>=1.4",
    # Headers and orientations of NIfTI and MGH files.
    "nibabel>=5.2",
    # Inflates two to three times as fast as the standard library, which takes its place where there is no
    # wheel.
    'isal>=1.7; platform_machine in "x86_64 AMD64 aarch64 arm64"',
    # PNG slices, and the mask that ships with the package.
    "pillow>=10.0",
    # Checkpoints that cannot run code when they are loaded.
    "safetensors>=0.4",
    # Device, mixed precision and ranks of the training loop.
    "lightning-fabric>=2.4",
    # Pictures of the report, of samples and of explanations.
    "matplotlib>=3.8",
    # The page of the report.
    "jinja2>=3.1",
    # Commands and their options.
    "typer>=0.15",
    # Tables and progress bars of the commands.
    "rich>=13.7",
]
# Results as Parquet files.
PARQUET = ["pyarrow>=15"]
# Event files of a training.
TENSORBOARD = ["tensorboard>=2.16"]
# Classification on several machines.
RAY = ["ray[data]>=2.40"]
# Export to ONNX; ONNX Runtime compares the graphs with the model and runs them without torch.
ONNX = ["onnx>=1.19", "onnx-ir>=0.1.12", "onnxscript>=0.5"]
EXPORT_CPU = [*ONNX, "onnxruntime>=1.20"]

# Networks that stand beside the flow (`bench/baselines`), in an environment of their own (`make baselines`):
# torchvision cannot be imported beside a CPU build of torch without a shim, and breaks what imports it.
BASELINES = ["timm>=1.0.20", "torchvision>=0.21"]

setup(
    name="fastflow",
    version=version(),
    description=(
        "Fused normalizing-flow kernels and MAGIC-Flow, "
        "a class-conditional multiscale flow for brain-scan slices"
    ),
    long_description=(ROOT / "README.md").read_text(encoding="utf-8")
    if (ROOT / "README.md").exists()
    else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "fastflow/data/assets/LICENCES.md"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["fastflow", "fastflow.*"]), "fastflow.export"],
    package_dir={"fastflow.export": "export"},
    package_data={
        "fastflow": ["py.typed"],
        "fastflow.data": ["assets/**"],
        "fastflow.evaluation": ["templates/*"],
    },
    install_requires=CORE,
    extras_require={
        "dev": [
            *(
                "build",
                "setuptools>=77",
                "hypothesis",
                "mypy",
                "pytest>=8",
                "pytest-benchmark",
                "pytest-xdist",
                "ruff",
            ),
            # The schema of what a model repository holds; its gRPC extra would pin an old protobuf.
            "tritonclient>=2.69",
            *(*PARQUET, *RAY, *EXPORT_CPU, *TENSORBOARD),
        ],
        "parquet": PARQUET,
        "ray": RAY,
        "tensorboard": TENSORBOARD,
        "export": [*ONNX, "onnxruntime-gpu>=1.20"],
        "export-cpu": EXPORT_CPU,
        "baselines": BASELINES,
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

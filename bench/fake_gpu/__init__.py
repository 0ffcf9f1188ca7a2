"""A GPU that holds sizes only: the package's real code runs on fake tensors on ``"cuda"``.

Without autograd, a CPU build of torch takes fake tensors on ``"cuda"`` as it is. Its autograd ends the
process, as it asks for the device. `load` puts a small library (`shim.cpp`) in the place of the device; it
must be loaded before torch is imported, and lasts for the process. Counts and lints therefore run in
processes of their own: nothing here imports torch, which is left to `bench.fake_gpu.tensors`.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

SOURCE = Path(__file__).with_name("shim.cpp")
BUILDS = Path(__file__).parents[2] / "build" / "fake_gpu"


def torch_folder() -> Path:
    """The folder of torch, which is not imported."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def is_cpu_build() -> bool:
    """Whether torch was built without CUDA."""
    text = (torch_folder() / "version.py").read_text(encoding="utf-8")
    return re.search(r"^cuda\b.*=\s*None$", text, re.MULTILINE) is not None


def unavailable() -> str:
    """The reason why there is no fake GPU here; empty where there is one."""
    if sys.platform != "linux":
        return f"the fake GPU is built for Linux, not {sys.platform}"
    if not is_cpu_build():
        return "the fake GPU needs a CPU build of torch"
    if shutil.which("g++") is None:
        return "the fake GPU needs g++"
    return ""


def load() -> None:
    """Put the fake GPU in its place; the first call of a checkout builds it, which takes seconds.

    Raises:
        RuntimeError: torch is imported already, or there is no fake GPU here.
    """
    if "torch" in sys.modules:
        raise RuntimeError("the fake GPU must be loaded before torch is imported")
    if reason := unavailable():
        raise RuntimeError(reason)
    ctypes.CDLL(str(_library()), ctypes.RTLD_GLOBAL)


def leave(code: int = 0) -> NoReturn:
    """End the process at once: autograd's thread of the device, while it ends, now and then ends it badly."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _library() -> Path:
    folder = torch_folder()
    about = SOURCE.read_bytes() + (folder / "version.py").read_bytes() + str(folder).encode()
    library = BUILDS / f"shim-{hashlib.sha256(about).hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}")
        flags = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{folder / 'include'}"]
        libraries = [f"-L{folder / 'lib'}", f"-Wl,-rpath,{folder / 'lib'}", "-ltorch_cpu", "-lc10"]
        command = ["g++", *flags, str(SOURCE), "-o", str(made), *libraries]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the fake GPU did not build:\n{done.stderr[-2000:]}")
        os.replace(made, library)
    return library

"""The registry of ops: what computes each of them on which device, and how `torch.library` knows it.

Everything about an op is found by its name, say `squeeze2x2` of the file `squeeze`:

=====================================  =======================================================================
``fastflow/kernels/squeeze.py``        equation, shapes, dtype rule; its definition (`squeeze2x2_reference`),
                                       its public function with checks and its `autograd.Function`
``fastflow/kernels/triton/squeeze.py`` kernels and the launcher `launch_squeeze2x2`
``fastflow/kernels/cpu/squeeze.py``    a form for CPUs, `squeeze2x2_cpu`, if the definition is not fast enough
``OPS["squeeze2x2"]``                  all of these in one entry; backward passes end in ``_backward``
``torch.ops.fastflow.squeeze2x2``      the entry as compiled graphs hold it
``tests/kernels/test_squeeze.py``      kernel and CPU form against the definition, and every ValueError
``tests/kernels/test_registry.py``     cases for ``torch.library.opcheck``, one at least for each entry
``bench/aot.py``, ``bench/aot.csv``    builds ahead of time, with registers and spills of each
``bench/roofline.py``                  bytes moved; ``bench/test_ops.py`` has timings
=====================================  =======================================================================

Public functions run an entry of `OPS`: on a CUDA device its launcher starts Triton kernels, on a CPU its form
for CPUs runs, and with ``TRITON_INTERPRET=1`` a CPU runs the kernels in Triton's interpreter. Graphs being
exported take the definition itself.

Ops ignore autocast: they take any mix of dtypes (a float32 stream beside bfloat16 scales and shifts), widen
after the load and narrow at the store. `custom_fwd` with `cast_inputs` and `register_autocast` would cast
every argument to one dtype, a pass over memory that also rounds the stream;
`fastflow.numerics.full_precision` keeps autocast away from the definitions.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastflow.kernels import planning
from fastflow.kernels.transforms import is_transformed
from fastflow.kernels.triton.launch import has_triton, interpreted

BACKENDS = ("auto", "triton", "reference")

_library = torch.library.Library("fastflow", "DEF")


@dataclasses.dataclass(frozen=True)
class Op:
    """One direction (forward or backward) of an op.

    Attributes:
        name: name of the entry in `OPS` and in ``torch.ops.fastflow``.
        definition: plain ATen that decides what is right. A forward definition may take the arguments of the
            public function and return its result alone; a backward definition takes those of the entry.
        cpu: what runs on a CPU. Its first argument is a tensor or a list of them, whose device decides
            between `cpu` and `triton`.
        triton: the launcher, which starts the kernels; None where an op has no kernels.
        fake: gives shapes, dtypes and strides of the results. Its annotations are the op's schema.
        functions: names of the public functions that run the entry; none for a backward entry.
        unsupported: says why the kernels have no form for the arguments, empty where they have one; None
            where they always have one.
        limit: a sentence for people about `unsupported`.
    """

    name: str
    definition: Callable[..., Any]
    cpu: Callable[..., Any]
    triton: Callable[..., Any] | None
    fake: Callable[..., Any]
    functions: tuple[str, ...]
    unsupported: Callable[..., str] | None
    limit: str


OPS: dict[str, Op] = {}


# -- choice of an implementation -----------------------------------------------------------------------------


def _check_backend(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_backend = _check_backend(os.environ.get("FASTFLOW_BACKEND", "auto"), "FASTFLOW_BACKEND")


def set_backend(name: str) -> None:
    """Choose what runs the ops.

    Args:
        name: ``"auto"`` takes Triton on a CUDA device, and the form for CPUs elsewhere or where a kernel has
            no form for the input. ``"triton"`` does the same, but an op that cannot run its kernel raises
            ValueError. ``"reference"`` runs the definitions under autograd on every device, differentiable
            any number of times.

    The environment variable ``FASTFLOW_BACKEND`` sets what a process starts with.

    Raises:
        ValueError: another name.
    """
    global _backend
    _backend = _check_backend(name, "backend")
    planning.clear_launch_plans()


def get_backend() -> str:
    """The name given to `set_backend`."""
    return _backend


def takes_reference() -> bool:
    """Whether public functions run the differentiable reference instead of a registered op.

    Raises:
        RuntimeError: they do not, and a transform of `torch.func` or forward-mode differentiation asks for
            it.
    """
    if _backend == "reference" or torch.compiler.is_exporting():
        return True
    if is_transformed():
        raise RuntimeError(
            "transforms of torch.func (grad, vjp, jvp, vmap, ...) and forward-mode differentiation need the "
            f"ops' definitions, and the backend is {_backend!r}; call "
            "fastflow.kernels.set_backend('reference') first"
        )
    return False


def explain(device: str) -> tuple[str, str]:
    """(implementation, why) of an op with kernels on a ``"cuda"`` or ``"cpu"`` device."""
    if _backend == "reference":
        return "reference", "the backend is set to reference"
    if not has_triton():
        return "reference", "Triton is not installed"
    if device == "cuda":
        return "triton", "CUDA device"
    if interpreted():
        return "triton", "TRITON_INTERPRET=1: kernels run in the interpreter"
    return "reference", "no CUDA device"


def runs_triton(x: Tensor) -> bool:
    """Whether ops with kernels run them for `x`."""
    return not takes_reference() and explain("cuda" if x.is_cuda else "cpu")[0] == "triton"


def use_triton(x: Tensor, unsupported: str = "") -> bool:
    """Whether kernels run for `x`.

    Args:
        x: an input.
        unsupported: why the kernel has no form for this input; empty when it has.

    Raises:
        ValueError: the backend is ``"triton"`` and the kernel cannot run.
    """
    implementation, why = explain("cuda" if x.is_cuda else "cpu")
    why = unsupported or why
    chosen = implementation == "triton" and not unsupported
    if _backend == "triton" and not chosen:
        raise ValueError(
            f"backend 'triton' cannot run here: {why} (x is on {x.device}); use set_backend('auto')"
        )
    return chosen


def register(
    name: str,
    *,
    definition: Callable[..., Any],
    triton: Callable[..., Any] | None,
    fake: Callable[..., Any],
    cpu: Callable[..., Any] | None = None,
    functions: tuple[str, ...] = (),
    unsupported: Callable[..., str] | None = None,
    limit: str = "",
) -> Any:
    """Add an op to `OPS` and, where it has kernels, to ``torch.ops``. Arguments are the attributes of `Op`.

    Returns:
        The entry in ``torch.ops.fastflow``, which is called with positions, behind the look-up of launch
            plans (`fastflow.kernels.planning`); None where the op has no kernels.
    """
    op = Op(name, definition, cpu or definition, triton, fake, functions, unsupported, limit)
    OPS[name] = op
    if triton is None:
        return None

    def run(x: Tensor | Sequence[Tensor], *rest: Any) -> Any:
        if use_triton(x if isinstance(x, Tensor) else x[0], unsupported(x, *rest) if unsupported else ""):
            return triton(x, *rest)
        return op.cpu(x, *rest)

    schema = torch.library.infer_schema(fake, mutates_args=())
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    # Compiled graphs call the entry, and repeat launches behind it.
    repeated = planning.planned(run)
    _library.impl(name, repeated, "CPU")
    _library.impl(name, repeated, "CUDA")
    torch.library.register_fake(f"fastflow::{name}", fake, lib=_library)
    return planning.planned(getattr(torch.ops.fastflow, name).default, direct=run)


# -- autograd ------------------------------------------------------------------------------------------------


def is_recorded(*values: Tensor | None) -> bool:
    """Whether autograd will ask for a gradient of one of the tensors."""
    return torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in values)


_WITH_MORE = "set_backend('reference') differentiates any number of times"


def refuse_second_derivative(op: str, way_on: str = _WITH_MORE) -> None:
    """Raise RuntimeError in a backward pass that is itself recorded.

    torch's `once_differentiable` would leave terms out of a second derivative without a word.

    Args:
        op: to name.
        way_on: what has more derivatives.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{op} has one derivative here (create_graph=True asks for more); {way_on}")

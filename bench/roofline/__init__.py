"""Bytes and launches of every op of the flow, counted without a GPU: ``python -m bench.roofline [--batch 16]
[--csv FILE]``.

Each op and each half-step's coupling in the paper's model is counted three times, forward and forward +
backward:

- *needed*: the fewest bytes, each tensor that the pass must read once and each that it gives once. Forward
  and backward are two passes, since the rest of the network runs between them.
- *moved*: by the package's ops. Their launchers run while `recording` notes the launches; a launch moves each
  of its tensor arguments once, since its programs partition them, and the ATen ops that a launcher adds are
  counted beside it. A tensor that many programs read again (masks, which the batch shares, and weights per
  channel) comes from cache and so counts once.
- *composite*: by the definition in plain ATen under autograd, each op reading its inputs and writing its
  outputs once. An op counts as one launch even where CUDA takes two (`masked_fill` clones first), in favour
  of the composite.

A bound is moved bytes over the memory bandwidth in the data sheet: no time is measured. Tensors are fake,
sizes without memory, and nothing is computed. Where the compiler drops a load that nothing uses (the shift in
a backward pass that saves x), moved is above what a GPU reads. `bench/test_ops.py` times the same works.

Whole half-steps, conditioner and coupling, are counted outside of convolutions and matrix products, whose
bytes stand in columns of their own. *Fused* is the form that the models run on a GPU in a training step:
`encode` and `couple`, each of the package's ops as the launches of its launcher, every other ATen op as in a
composite. Operands of the products within the head kernels, and all that the products of a pyramid's maps
move, count with the products. *Plain* is the same half-step in ATen ops, in the least costly form at hand:
the package's references with their tables per label, dropout as the one launch that CUDA has for it, single
launches for means and maxima, and the atrous pyramid as it is published: concatenated, averaged, gated,
mapped by one convolution. Both get the masked input, the tables and label indices whose values are known to
be in them, and both give the next masked input. The layout is contiguous; bfloat16 is autocast (that of the
CPU, whose list has the same products), with its casts of weights on both sides; the sums that autograd makes
where a tensor is used twice count on both sides.

`machine` holds bandwidths, shapes and targets, `counting` the counters, `works` and `features` the ops that
are counted, `counts` their rows, `models` the models' half-steps, `report` the command.
"""

from bench.roofline.counting import (
    Cost,
    Counter,
    HalfStepCounter,
    kernels_chosen,
    touched_bytes,
)
from bench.roofline.counts import Row, count, needed_bytes, rows
from bench.roofline.features import DROPOUT, FEATURE_SHAPES, feature_works, head_works
from bench.roofline.machine import (
    BANDWIDTH,
    CLASSES,
    MAX_BYTES_OVER_PLAIN,
    MAX_LAUNCHES_OVER_PLAIN,
    MAX_OVER_COMPOSITE,
    MAX_OVER_NEEDED,
    PAPER_SHAPES,
    PASSES,
    STEPS,
)
from bench.roofline.models import (
    DTYPES,
    TASKS,
    HalfStep,
    StepRow,
    both_passes,
    fused_form,
    half_step,
    plain_form,
    step_rows,
)
from bench.roofline.report import main
from bench.roofline.works import OP_SHAPES, Work, half_steps, make_data, op_works

__all__ = [
    "BANDWIDTH",
    "CLASSES",
    "DROPOUT",
    "DTYPES",
    "FEATURE_SHAPES",
    "MAX_BYTES_OVER_PLAIN",
    "MAX_LAUNCHES_OVER_PLAIN",
    "MAX_OVER_COMPOSITE",
    "MAX_OVER_NEEDED",
    "OP_SHAPES",
    "PAPER_SHAPES",
    "PASSES",
    "STEPS",
    "TASKS",
    "Cost",
    "Counter",
    "HalfStep",
    "HalfStepCounter",
    "Row",
    "StepRow",
    "Work",
    "both_passes",
    "count",
    "feature_works",
    "fused_form",
    "half_step",
    "half_steps",
    "head_works",
    "kernels_chosen",
    "main",
    "make_data",
    "needed_bytes",
    "op_works",
    "plain_form",
    "rows",
    "step_rows",
    "touched_bytes",
]

"""All labels of an image in one batched pass: labels are a batch dimension, and what they share is computed once.

`LabelScorer` is the engine; `log_prob_all` is the engine with its defaults, under autograd where gradients are recorded.
`score_slices` runs a scorer over 8-bit slices in batches and `volume_log_probs` joins a volume's slices.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import numpy as np
import torch
import torch.fx.experimental._config
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastflow import kernels
from fastflow.errors import InvalidImageWarning, PrecisionWarning, UninitializedModelError
from fastflow.models import folded
from fastflow.models.conditioners.blocks import conditioner_dtype

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastflow.models.magic_flow import LabelTables, MagicFlow

PRECISIONS = ("float32", "mixed")
ENGINES = ("auto", "eager", "compile", "cuda_graph")

# Rows are micro-batched so that one activation of the widest stage stays near this many elements: on CPUs, more only stream more
# memory (measured: no gain from 28 rows of 184x184 on).
CPU_ELEMENTS = 1 << 22
# Beyond this many rows a GPU gains nothing.
CUDA_ROWS = 4096
# Of the memory that is free when a scorer is made, what its activations may take.
MEMORY_SHARE = 0.5
# A row holds about this many activations of its widest stage at a time, and of its stream.
LIVE_ACTIVATIONS, LIVE_STREAMS = 6, 12


# -- engines --------------------------------------------------------------------------------------------------------------


class _State(NamedTuple):
    """Images on their way: what no label changes, once per image. `terms` (B,) are the parts of log p(x|y) so far, in float64."""

    planes: tuple[Tensor, ...]
    terms: list[Tensor]


class _Engine(Protocol):
    """Scores blocks of images in two parts, of which the first knows no labels."""

    def start(self, x: Tensor) -> _State:
        """Everything before the first op that knows a label, for images (B, C, H, W)."""

    def finish(self, state: _State, first: int, last: int) -> Tensor:
        """Log-likelihoods (B, last - first), float64, of labels `first` to `last` (exclusive)."""


class _Eager:
    """The model's own modules on their kernels, with tables, matrices and constants computed once.

    A row's bits depend on neither its batch nor the number of labels beside it. Built where gradients are recorded, it is
    differentiable.
    """

    def __init__(self, model: MagicFlow) -> None:
        config, steps = model.config, model.steps
        self.model, self.free, self.count = model, config.condition_from_step, config.num_steps
        self.tables: LabelTables = model.label_tables(torch.arange(config.num_classes, device=model.device))
        self.maps = [step.map(model.dtype) for step in steps]
        self.then = [model.following(i, self.count) for i in range(self.count)]
        self.constant = torch.stack([step.mixing_logdet() for step in steps]).sum()
        self._rows: dict[tuple[int, int, int], Tensor] = {}

    def rows(self, batch: int, first: int, last: int) -> Tensor:
        """The table row of each sample: labels `first` to `last` of each of `batch` images. Kept, since ops look at one once."""
        key = batch, first, last
        if key not in self._rows:
            self._rows[key] = torch.arange(first, last, device=self.model.device).repeat(batch)
        return self._rows[key]

    def start(self, x: Tensor) -> _State:
        h, masked, terms = self._steps(x, None, self.rows(len(x), 0, 1), 0, self.free)
        return _State(self._mix(h, self.free) if masked is None else (h, masked), terms)

    def finish(self, state: _State, first: int, last: int) -> Tensor:
        (h, masked), labels = state.planes, last - first
        batch = len(h)
        # The first conditioner takes its input once per image, and spreads it where it first knows a label.
        h = h.repeat_interleave(labels, dim=0)
        h, _, terms = self._steps(h, masked, self.rows(batch, first, last), self.free, self.count)
        terms += [_prior(h), *(term.repeat_interleave(labels) for term in state.terms)]
        return (torch.stack(terms).sum(dim=0) + self.constant).view(batch, labels)

    def _mix(self, h: Tensor, i: int) -> tuple[Tensor, Tensor]:
        step, (weight, bias) = self.model.steps[i], self.maps[i]
        return kernels.channel_mix_masked(h, weight, bias, step.coupling.mask, step.squeeze, dtype=conditioner_dtype(h))

    def _steps(
        self, h: Tensor, masked: Tensor | None, rows: Tensor, first: int, last: int
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        terms = []
        for i in range(first, last):
            if masked is None:
                h, masked = self._mix(h, i)
            # The end of a label-free step may already be the beginning of the first one that knows labels.
            h, logdet, masked = self.model.steps[i].coupling(h, masked, self.tables.steps[i], rows, then=self.then[i])
            terms.append(logdet.double())
            if self.model.steps[i].split:
                h, block = h.chunk(2, dim=1)
                terms.append(_prior(block))
        return h, masked, terms


def _prior(block: Tensor) -> Tensor:
    return kernels.latent_prior(block.flatten(1)).double()


class _Compiled:
    """`folded` couplings compiled by Inductor: one graph for all steps of one shape, for any number of rows and of labels.

    Graphs of generation conditioners are compiled again for some numbers of rows.
    Compiling takes about 20 seconds a graph (the paper preset has 13) with a cold cache; Inductor keeps its code on disk.
    """

    def __init__(self, model: MagicFlow, dtype: torch.dtype) -> None:
        self.device = model.device
        if self.device.type == "cpu":
            _check_compiler()
        config = model.config
        self.free = config.condition_from_step
        tables = model.label_tables(torch.arange(config.num_classes, device=self.device))
        self.model = folded.fold(model, tables, dtype)
        for half in (half for step in self.model.steps for half in step.halves):
            torch._dynamo.mark_dynamic(half.films, 0)
            if isinstance(half.net, folded.ClassificationNet):
                torch._dynamo.mark_dynamic(half.net.heads.table, 0)
        self.run = torch.compile(folded.run_half, options={"cpp.enable_floating_point_contract_flag": "fast"})

    def start(self, x: Tensor) -> _State:
        with _settings():
            image = folded.to_planes(x.permute(0, 2, 3, 1), self.model.phases)
            rows = torch.zeros(len(x), dtype=torch.int64, device=x.device)
            planes, terms = folded.run_steps((image,), rows, None, self.model.steps[: self.free], self.model.phases, self._half)
            return _State(folded.run_mix(planes, self.model.steps[self.free], self.model.phases), terms)

    def finish(self, state: _State, first: int, last: int) -> Tensor:
        batch, labels = len(state.planes[0]), last - first
        image = torch.arange(batch, device=self.device).repeat_interleave(labels)
        rows = torch.arange(first, last, device=self.device).repeat(batch)
        with _settings():
            steps = self.model.steps[self.free :]
            planes, terms = folded.run_steps(state.planes, rows, image, steps, self.model.phases, self._half)
        terms += [folded.square_sum(planes).double(), *(term[image] for term in state.terms)]
        return (torch.stack(terms).sum(dim=0) + self.model.constant).view(batch, labels)

    def _half(
        self, passive: Tensor, moved: Tensor, rows: Tensor, half: folded.Half, image: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        count = len(rows)
        # Graphs are compiled for any number of rows above one, and for one tensor of planes or for two.
        if len(passive) == 1:
            both = passive is moved
            passive = passive.expand(2, *passive.shape[1:]).contiguous()
            moved = passive if both else moved.expand(2, *moved.shape[1:]).contiguous()
        if count == 1:
            rows = rows.expand(2).contiguous()
            image = None if image is None else image.expand(2).contiguous()
        for value in (passive, moved, rows, *(() if image is None else (image,))):
            torch._dynamo.mark_dynamic(value, 0)
        moved, logdet = self.run(passive, moved, rows, half, self.model.bound, image)
        return moved[:count], logdet[:count]


def _settings() -> AbstractContextManager[Any]:
    """What one graph for any number of rows and labels asks of the compiler."""
    stack = ExitStack()
    # That weights differ from step to step must not make their shapes dynamic, and there is a graph for each shape.
    limits: dict[str, Any] = {"recompile_limit": 512, "accumulated_recompile_limit": 4096}
    stack.enter_context(torch._dynamo.config.patch({"automatic_dynamic_shapes": False, **limits}))
    # That there are as many rows as labels, or images, is chance.
    stack.enter_context(torch.fx.experimental._config.patch(use_duck_shape=False))  # type: ignore[attr-defined]
    return stack


def _check_compiler() -> None:
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise RuntimeError(
            "engine='compile' needs a C++ compiler on a CPU (g++ or clang++ on the path, or CXX); engine='eager' needs none"
        ) from error


class _CudaGraphs:
    """Passes of `_Eager` captured as CUDA graphs, one for each number of images, a power of two."""

    def __init__(self, eager: _Eager) -> None:
        self.eager = eager
        self.graphs: dict[tuple[int, int, int], tuple[Tensor, Tensor, torch.cuda.CUDAGraph]] = {}
        self.pool: Any = None

    def start(self, x: Tensor) -> _State:
        return _State((x,), [])

    def finish(self, state: _State, first: int, last: int) -> Tensor:
        x = state.planes[0]
        bucket = 1 << (len(x) - 1).bit_length()
        key = bucket, first, last
        if key not in self.graphs:
            self.graphs[key] = self._capture(x, bucket, first, last)
        images, scores, graph = self.graphs[key]
        images[: len(x)].copy_(x)
        # What fills a bucket up is the last image once more: numbers as harmless as it is.
        images[len(x) :].copy_(x[-1:])
        graph.replay()
        return scores[: len(x)].clone()

    def _capture(self, x: Tensor, bucket: int, first: int, last: int) -> tuple[Tensor, Tensor, torch.cuda.CUDAGraph]:
        images = x[-1:].expand(bucket, *x.shape[1:]).clone()
        stream = torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            # Kernels compile and allocations settle before the capture, which may do neither.
            for _ in range(2):
                self.eager.finish(self.eager.start(images), first, last)
        torch.cuda.current_stream(x.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            scores = self.eager.finish(self.eager.start(images), first, last)
        self.pool = graph.pool() if self.pool is None else self.pool
        return images, scores, graph


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes products in bfloat16, and not only stores it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(bool(known.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))


# -- the scorer -----------------------------------------------------------------------------------------------------------


class Scores(NamedTuple):
    """What `LabelScorer.score` found.

    Attributes:
        log_probs: (B, K) log p(x|y) in nats, float32 or wider; NaN in the rows that are invalid.
        invalid: (B,) bool, whether an image holds NaN or infinity.
    """

    log_probs: Tensor
    invalid: Tensor


class LabelScorer:
    """Scores images under every label: log p(x|y) for all y in one batched pass.

    Tables, matrices and constants are computed once, when the scorer is made: of weights that change later it knows nothing.

    Args:
        model: the flow, initialised and in evaluation mode.
        precision: ``"float32"``: everything in the model's dtype, without TF32. ``"mixed"``: conditioners in bfloat16, the
            stream, the log-scales and shifts, exponentials and all sums in float32. Where the device has no bfloat16 arithmetic,
            conditioners stay in float32, with a `PrecisionWarning`.
        engine: ``"eager"``: kernels or ATen one after the other; on a CPU a row's bits depend on no other row. ``"compile"``:
            Inductor, one graph per shape of step, which takes minutes to compile at first; on a CPU it needs a C++ compiler, and
            a row's bits may depend on how many rows are scored with it. ``"cuda_graph"``: eager passes captured per
            power of two of images. ``"auto"``: ``"cuda_graph"`` on a CUDA device, else ``"eager"``, which needs no warm-up.
        max_rows: most rows (images times labels) in one pass; chosen from the model's size and the free memory when None. Images
            and, where there are more labels than rows, labels are split accordingly. An allocation that fails halves it.

    Attributes:
        engine: the engine in use.
        precision: the precision asked for.
        conditioner_dtype: the dtype that conditioners compute in.
        max_rows: the rows in use.

    Raises:
        ValueError: a choice that does not exist or does not fit the model, or a model in training mode.
        UninitializedModelError: the model has seen no data.
        RuntimeError: ``"compile"`` without a C++ compiler.

    Example:
        >>> from fastflow import FlowConfig, MagicFlow
        >>> model = MagicFlow(FlowConfig.tiny(num_classes=3)).eval()
        >>> x = torch.rand(4, 1, 16, 16) * 2 - 1
        >>> model.initialize(x)
        >>> scorer = LabelScorer(model)
        >>> scorer(x).shape, scorer.engine
        (torch.Size([4, 3]), 'eager')

    Source: MAGIC-Flow (Caldera, Bottacini, Cavinato; arXiv 2510.22070), whose published code runs one pass per label.
    """

    def __init__(self, model: MagicFlow, precision: str = "float32", engine: str = "auto", max_rows: int | None = None) -> None:
        _check_choice("precision", precision, PRECISIONS)
        _check_choice("engine", engine, ENGINES)
        _check_rows(max_rows)
        if model.training:
            raise ValueError("model must be in evaluation mode to be scored with (its dropout is active); call model.eval()")
        if not model.initialized:
            raise UninitializedModelError
        on_cuda = model.device.type == "cuda"
        if engine == "cuda_graph" and not on_cuda:
            raise ValueError(
                f"engine='cuda_graph' needs a model on a CUDA device, it is on {model.device}; use 'eager' or 'compile'"
            )
        if precision == "mixed" and model.dtype != torch.float32:
            raise ValueError(f"precision='mixed' needs a float32 model, it is {model.dtype}; use precision='float32'")
        self.model, self.precision = model, precision
        self.engine = ("cuda_graph" if on_cuda else "eager") if engine == "auto" else engine
        self.conditioner_dtype = _mixed_dtype(model.device) if precision == "mixed" else model.dtype
        self.max_rows = default_rows(model) if max_rows is None else max_rows
        # Tables and matrices are computed wide whatever the precision: rounded, they would shift whole labels.
        with self._context(narrow=False):
            if self.engine == "compile":
                self._engine: _Engine = _Compiled(model, self.conditioner_dtype)
            else:
                eager = _Eager(_without_parametrizations(model))
                self._engine = _CudaGraphs(eager) if self.engine == "cuda_graph" else eager

    def __call__(self, x: Tensor) -> Tensor:
        """Log-likelihoods of images.

        Args:
            x: (B, C, H, W) images in [-1, 1], on any device.

        Returns:
            (B, K) log p(x|y) in nats, float32 or wider, on the device of the model. Rows of images that hold NaN or infinity are
            NaN, with an `InvalidImageWarning` that names them; the others are what they would be without these.

        Raises:
            ValueError: the shape or dtype does not fit.
        """
        scores, invalid = self.score(x)
        if bool(invalid.any()):
            rows = torch.nonzero(invalid).flatten().tolist()
            shown = ", ".join(map(str, rows[:20])) + (", ..." if len(rows) > 20 else "")
            warnings.warn(
                f"{len(rows)} of {len(x)} images in x hold NaN or infinity, their scores are NaN: rows {shown}",
                InvalidImageWarning,
                stacklevel=2,
            )
        return scores

    def score(self, x: Tensor) -> Scores:
        """As calling the scorer, but invalid images are told by a flag instead of a warning."""
        x = self.model._check_images(x.to(self.model.device))
        with self._context():
            invalid = ~torch.isfinite(x.flatten(1)).all(dim=1)
            # A zero image in their place: compiled code is free to assume that there are no NaNs.
            x = torch.where(invalid[:, None, None, None], 0.0, x)
            log_probs, self.max_rows = _score(self._engine, x, self.model.config.num_classes, self.max_rows)
            log_probs = log_probs.to(torch.promote_types(x.dtype, torch.float32))
            return Scores(log_probs.masked_fill(invalid[:, None], float("nan")), invalid)

    def _context(self, narrow: bool = True) -> AbstractContextManager[Any]:
        """Without gradients, nor inference tensors (which compiled graphs would tell from others); mixed eager under autocast."""
        stack = ExitStack()
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(parametrize.cached())
        narrow = narrow and self.conditioner_dtype != self.model.dtype and self.engine != "compile"
        device = self.model.device.type
        if device == "cuda" and self.conditioner_dtype == self.model.dtype:
            stack.enter_context(_no_tf32())
        # A graph that was captured reads what it read then: weights that autocast had cached would be freed memory by now.
        cache = self.engine != "cuda_graph"
        stack.enter_context(
            torch.autocast(device, self.conditioner_dtype, cache_enabled=cache) if narrow else _no_autocast(device)
        )
        return stack


def _without_parametrizations(model: MagicFlow) -> MagicFlow:
    """A copy that shares the model's tensors, but has the weights of its normed convolutions computed, once for all passes."""
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    for module in copied.modules():
        if parametrize.is_parametrized(module):
            names = list(cast(nn.ModuleDict, module.parametrizations))
            weights = [getattr(module, name).detach() for name in names]
            # Not by `remove_parametrizations`, which takes the weight from the class, which the model's own modules share.
            module.__class__ = parametrize.type_before_parametrizations(module)
            del module.parametrizations
            for name, weight in zip(names, weights, strict=True):
                module.register_parameter(name, nn.Parameter(weight))
    return copied


@contextmanager
def _no_tf32() -> Iterator[None]:
    """Convolutions on tensor cores round float32 to 10 bits unless they are told not to."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_rows(max_rows: int | None) -> None:
    if max_rows is not None and (isinstance(max_rows, bool) or not isinstance(max_rows, int) or max_rows < 1):
        raise ValueError(f"max_rows must be an integer of at least 1, got {max_rows!r}")


def _mixed_dtype(device: torch.device) -> torch.dtype:
    if has_bfloat16(device):
        return torch.bfloat16
    warnings.warn(
        f"precision='mixed': {device.type} has no bfloat16 arithmetic here, so conditioners stay in float32",
        PrecisionWarning,
        stacklevel=3,
    )
    return torch.float32


def default_rows(model: MagicFlow) -> int:
    """Rows of one pass of the model: as many as are worth it, and as fit into half of the memory that is free."""
    config = model.config
    strided = config.task == "classification"
    # Activations of the widest stage: the first of a strided conditioner, any of the other kind.
    stages = (
        (f1 if strided else max(f1, f2, f3)) * (-(-h // 2) * -(-w // 2) if strided else h * w)
        for (f1, f2, f3), (_, h, w) in zip(config.widths, config.step_shapes, strict=True)
    )
    widest, element = max(stages), torch.finfo(model.dtype).bits // 8
    live = LIVE_ACTIVATIONS if strided else 3 * LIVE_ACTIVATIONS
    fit = int(MEMORY_SHARE * free_memory(model.device)) // (element * (live * widest + LIVE_STREAMS * config.num_dims))
    worth = CUDA_ROWS if model.device.type == "cuda" else min(CUDA_ROWS, CPU_ELEMENTS // widest)
    return max(1, min(fit, worth))


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device, about."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        # Not a Linux: what any machine that runs this has.
        return 4 << 30


# What says that memory ran out: an allocation on a CPU is a plain RuntimeError.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in str(error) for words in _NO_MEMORY)


def _score(engine: _Engine, x: Tensor, classes: int, max_rows: int) -> tuple[Tensor, int]:
    """Log-likelihoods (B, K) in float64, and the rows that memory turned out to allow."""
    parts: list[Tensor] = []
    done = 0
    while done < len(x):
        images = max(1, max_rows // classes)
        block = x[done : done + images]
        try:
            state = engine.start(block)
            labels = [engine.finish(state, first, last) for first, last in _spans(classes, max_rows)]
            parts.append(labels[0] if len(labels) == 1 else torch.cat(labels, dim=1))
        except (RuntimeError, MemoryError) as error:
            if max_rows == 1 or not _is_out_of_memory(error):
                raise
            max_rows = max(1, min(max_rows, len(block) * classes) // 2)
            if x.is_cuda:
                torch.cuda.empty_cache()
            continue
        done += len(block)
    return torch.cat(parts) if parts else x.new_zeros(0, classes, dtype=torch.float64), max_rows


def _spans(classes: int, max_rows: int) -> Iterator[tuple[int, int]]:
    """Labels in parts of at most `max_rows`, as even as can be."""
    parts = -(-classes // max_rows)
    size = -(-classes // parts)
    return ((first, min(first + size, classes)) for first in range(0, classes, size))


def log_prob_all(model: MagicFlow, x: Tensor, max_rows: int | None = None) -> Tensor:
    """Log p(x|y) for every label: what a `LabelScorer` with defaults gives, under autograd and autocast where they are on.

    Args:
        model: the flow.
        x: (B, C, H, W) images in [-1, 1].
        max_rows: most rows (images times labels) in one pass; see `LabelScorer`.

    Returns:
        (B, K) nats, float32 or wider.

    Raises:
        ValueError: `max_rows` is smaller than 1.
        UninitializedModelError: the model has seen no data.
    """
    _check_rows(max_rows)
    if not model.initialized:
        raise UninitializedModelError
    scores, _ = _score(_Eager(model), x, model.config.num_classes, default_rows(model) if max_rows is None else max_rows)
    return scores.to(torch.promote_types(x.dtype, torch.float32))


def posterior_from_log_probs(
    log_probs: Tensor, temperature: float = 1.0, prior: Tensor | Sequence[float] | None = None
) -> Tensor:
    """Softmax over labels of ``log_probs / temperature + log prior``.

    Args:
        log_probs: (B, K) nats.
        temperature: positive; tempers the likelihood only.
        prior: (K,) probabilities that sum to 1; uniform when None.

    Returns:
        (B, K).

    Raises:
        ValueError: the temperature is not positive, or the prior has another length, negative entries or another sum.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    logits = log_probs.double() / temperature
    if prior is not None:
        logits = logits + _check_prior(prior, log_probs.shape[1]).to(logits.device).log()
    return torch.softmax(logits, dim=1).to(log_probs.dtype)


def _check_prior(prior: Tensor | Sequence[float], classes: int) -> Tensor:
    values = torch.as_tensor(prior, dtype=torch.float64)
    if tuple(values.shape) != (classes,) or bool((values < 0).any()) or abs(float(values.sum()) - 1.0) > 1e-4:
        raise ValueError(f"prior must be {classes} probabilities that sum to 1, got {values.tolist()}")
    return values


@torch.inference_mode()
def score_slices(
    model: MagicFlow | LabelScorer,
    images: NDArray[np.uint8],
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> NDArray[np.float64]:
    """Log-likelihoods of 8-bit slices under every label.

    Args:
        model: the flow, in evaluation mode, or a scorer of it.
        images: (N, 1, H, W) uint8.
        batch_size: images per pass.
        progress: called with the number of slices done.

    Returns:
        (N, K) nats.
    """
    scorer = model if isinstance(model, LabelScorer) else LabelScorer(model, engine="eager")
    out = np.empty((len(images), scorer.model.config.num_classes))
    for start in range(0, len(images), batch_size):
        batch = torch.from_numpy(images[start : start + batch_size])
        if scorer.model.device.type == "cuda":
            # Only pinned memory is copied beside other work, and as fast as the bus can.
            batch = batch.pin_memory()
        x = from_uint8(batch.to(scorer.model.device, non_blocking=True))
        out[start : start + batch_size] = scorer(x).double().cpu().numpy()
        if progress is not None:
            progress(min(start + batch_size, len(images)))
    return out


def from_uint8(images: Tensor) -> Tensor:
    """8-bit images to [-1, 1]: ``2 * v / 255 - 1``, the published scaling."""
    return images.float() * (2.0 / 255.0) - 1.0


def volume_log_probs(slice_log_probs: NDArray[np.float64], volumes: NDArray[Any]) -> NDArray[np.float64]:
    """Sum the log-likelihoods of each volume's slices, as if they were independent given the label.

    Args:
        slice_log_probs: (N, K) nats.
        volumes: (N,) index of each slice's volume, from 0 to V - 1.

    Returns:
        (V, K) nats.
    """
    out = np.zeros((int(volumes.max(initial=-1)) + 1, slice_log_probs.shape[1]))
    np.add.at(out, volumes, slice_log_probs)
    return out

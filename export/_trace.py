"""From a graph's module to an ONNX model: each part is traced once, as a function, and inlined in callers.

Tracing with a batch of any size takes seconds for each half of a coupling, and the halves of one shape differ
by their tensors only. Only those passes of the exporter's clean-up are run that these graphs need: its
rewriting rules take most of an export's time and find nothing to do.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as passes
import onnxscript.optimizer
import torch
from torch import nn

from .graphs import Graph, Part, Parts

# Graphs are traced with this batch size; a batch of one would be taken for a constant.
EXAMPLE_BATCH = 3


def trace(graph: Graph, functions: dict[Any, ir.Function], opset: int) -> ir.Model:
    """An ONNX model of a graph, its batch dynamic.

    Args:
        graph: the graph; its `parts` collects the parts that are traced by themselves.
        functions: functions of the parts that other graphs traced already; more are added.
        opset: version of ONNX' operators.

    Raises:
        RuntimeError: a dimension that should be the batch came out as something else.
    """
    assert graph.parts is not None
    example = graph.example(EXAMPLE_BATCH)
    batch = torch.export.Dim("batch", min=1)
    model = _export(graph, example, [{0: batch}] * len(example), opset, graph.inputs, graph.outputs)
    for i, (key, part) in enumerate(graph.parts.parts.items()):
        if key not in functions:
            functions[key] = _function(part, graph.parts.name(i), opset)
        function = functions[key]
        model.functions[function.identifier()] = function.clone()
    _clean(model)
    _check_batch(model)
    return model


def _export(
    module: nn.Module,
    example: tuple[Any, ...],
    shapes: Any,
    opset: int,
    inputs: Any = None,
    outputs: Any = None,
) -> ir.Model:
    with _quiet():
        program = torch.onnx.export(
            module.eval(),
            example,
            dynamo=True,
            optimize=False,
            opset_version=opset,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=tuple(shapes),
            verbose=False,
        )
    assert program is not None
    return program.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence notes about packages that are not needed, and about the exporter's own use of PyTorch."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _function(part: Part, name: str, opset: int) -> ir.Function:
    """A part as an ONNX function of (planes, label_index, [image_index,] tensors...)."""
    planes, label_index, image_index, tensors = part.example(EXAMPLE_BATCH)
    batch = torch.export.Dim("batch", min=1)
    # Planes that come once per image have another first dimension than the pairs of an image and a label.
    pairs = batch if image_index is None else torch.export.Dim("pairs", min=1)
    fixed: tuple[dict[int, Any], ...] = tuple({} for _ in tensors)
    shapes = [{0: batch}, {0: pairs}, None if image_index is None else {0: pairs}, fixed]
    model = _export(part, (planes, label_index, image_index, tensors), shapes, opset)
    onnxscript.optimizer.fold_constants(model)
    passes.RemoveUnusedNodesPass()(model)
    graph = model.graph
    # Constants become nodes, because a function has no initializers.
    for value in list(graph.initializers.values()):
        assert value.const_value is not None
        node = ir.Node("", "Constant", inputs=[], attributes=[ir.AttrTensor("value", value.const_value)])
        value.replace_all_uses_with(node.outputs[0])
        graph.insert_before(graph[0], node)
    graph.initializers.clear()
    _forget_symbols(graph)
    return ir.Function(Parts.domain, name, graph=graph, attributes=[])


def _forget_symbols(graph: ir.Graph) -> None:
    """Drop names of dimensions in a body: one name would stand for images in one call and labels in another.

    ONNX Runtime takes dimensions of one name for equal and puts such tensors in the same memory, one after
    the other.
    """
    values = (*graph.inputs, *graph.outputs, *(value for node in graph for value in node.outputs))
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([size if isinstance(size, int) else None for size in value.shape])


def _clean(model: ir.Model) -> None:
    passes.InlinePass()(model)
    for _ in range(2):
        onnxscript.optimizer.fold_constants(model)
        passes.RemoveUnusedNodesPass()(model)
    clean = (
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.RemoveUnusedNodesPass(),
        passes.ClearMetadataAndDocStringPass(),
        passes.NameFixPass(),
    )
    for step in clean:
        step(model)


def _check_batch(model: ir.Model) -> None:
    """Refuse a batch that was exported as a number: it would be wrong for others, without a word."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        first = value.shape[0] if value.shape is not None and len(value.shape) else None
        if not isinstance(first, ir.SymbolicDim) or first.value != "batch":
            raise RuntimeError(
                f"{value.name} of the graph must have a first dimension 'batch', it has shape {value.shape}"
            )

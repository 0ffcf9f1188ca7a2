"""The configuration of a model for NVIDIA's Triton Inference Server, as text-format protobuf."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DEVICES = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "cuda": "KIND_GPU"}
# A request waits this long for others to share a batch with: short beside the work of a batch.
QUEUE_DELAY_US = 2000
# The file with the names of the classes, one a line.
LABELS = "labels.txt"
# The first line of a configuration: a folder that has it may be replaced.
HEADER = "# A model of fastflow, written from its ONNX export."
SCORE_COMMENTS = (
    "# log_probs are log p(image | class) in nats. "
    "A client that asks for `classification` of this output gets texts",
    "# 'VALUE:INDEX:CLASS', largest VALUE first: VALUE is the log-likelihood, "
    "and the first is the most probable class under a",
    "# uniform prior. For other priors ask for the numbers: "
    "posterior = softmax(log_probs / temperature + log prior).",
)


@dataclass(frozen=True)
class ServedTensor:
    """An input or output of a graph.

    Attributes:
        name: its name.
        data_type: the server's name of its type.
        dims: its shape without the batch dimension; empty where a sample is one number.
    """

    name: str
    data_type: str
    dims: tuple[int, ...]

    @property
    def request_dims(self) -> tuple[int, ...]:
        """The shape of a sample in requests, where no shape may be empty."""
        return self.dims or (1,)


@dataclass(frozen=True)
class Serving:
    """How models are served; see `fastflow.export.triton_server.write_model_repository`."""

    max_batch: int
    instances: int
    device: str

    def __post_init__(self) -> None:
        for name, value in (("max_batch", self.max_batch), ("instances", self.instances)):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
                raise ValueError(f"{name} must be a whole number of 1 or more, got {value!r}")
        if self.device not in DEVICES:
            raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {self.device!r}")

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Sizes to make batches of, ascending: few, because a GPU plans every new one."""
        powers = (2**power for power in range(1, self.max_batch.bit_length()))
        return tuple(sorted({*powers, self.max_batch}))


class _Keyword(str):
    """A value of an enumeration, which text format writes without quotes."""

    __slots__ = ()


# A message of text-format protobuf: its fields in order. Tuples are lists of numbers.
_Value = str | int | tuple[int, ...] | list["tuple[str, _Value]"]
_Message = list[tuple[str, _Value]]


def model_config(
    name: str,
    graph: str,
    inputs: Sequence[ServedTensor],
    outputs: Sequence[ServedTensor],
    serving: Serving,
    described: Mapping[str, Any],
) -> str:
    """The text of a model's ``config.pbtxt``.

    Args:
        name: the model's name.
        graph: the graph that it serves; the log-likelihoods of ``"score"`` have labels.
        inputs: inputs of the graph.
        outputs: outputs of the graph.
        serving: how it is served.
        described: JSON values that clients get as parameters ``fastflow.KEY``.
    """
    message: _Message = [("name", name), ("backend", "onnxruntime"), ("max_batch_size", serving.max_batch)]
    message += [("input", _tensor_message(tensor)) for tensor in inputs]
    labels: _Message = [("label_filename", LABELS)]
    message += [
        ("output", _tensor_message(tensor) + (labels if tensor.name == "log_probs" else []))
        for tensor in outputs
    ]
    message.append(("version_policy", [("latest", [("num_versions", 1)])]))
    if serving.max_batch > 1:
        batching: _Message = [
            ("preferred_batch_size", serving.batch_sizes),
            ("max_queue_delay_microseconds", QUEUE_DELAY_US),
        ]
        message.append(("dynamic_batching", batching))
    kind = _Keyword(DEVICES[serving.device])
    message.append(("instance_group", [("count", serving.instances), ("kind", kind)]))
    message += [("model_warmup", _warmup_message(inputs, size)) for size in sorted({1, *serving.batch_sizes})]
    # These are the backend's own settings, at their defaults: operators in sequence, one thread for each
    # core.
    parameters = {"execution_mode": "0", "intra_op_thread_count": "0"}
    for key, value in described.items():
        parameters[f"fastflow.{key}"] = value if isinstance(value, str) else json.dumps(value)
    message += [
        ("parameters", [("key", key), ("value", [("string_value", value)])])
        for key, value in parameters.items()
    ]
    return "\n".join([HEADER, *(SCORE_COMMENTS if graph == "score" else ()), *_lines(message), ""])


def _tensor_message(tensor: ServedTensor) -> _Message:
    message: _Message = [
        ("name", tensor.name),
        ("data_type", _Keyword(tensor.data_type)),
        ("dims", tensor.request_dims),
    ]
    if not tensor.dims:
        message.append(("reshape", [("shape", ())]))
    return message


def _warmup_message(inputs: Sequence[ServedTensor], batch_size: int) -> _Message:
    # Zeros are a valid image, latent and label. The server's random data are random bits, with NaN among
    # them.
    message: _Message = [("name", f"zeros, batch of {batch_size}"), ("batch_size", batch_size)]
    for tensor in inputs:
        value: _Message = [
            ("data_type", _Keyword(tensor.data_type)),
            ("dims", tensor.request_dims),
            ("zero_data", True),
        ]
        message.append(("inputs", [("key", tensor.name), ("value", value)]))
    return message


def _lines(message: _Message, indent: str = "") -> Iterator[str]:
    for name, value in message:
        if isinstance(value, list):
            yield f"{indent}{name} {{"
            yield from _lines(value, indent + "  ")
            yield f"{indent}}}"
        else:
            yield f"{indent}{name}: {_scalar(value)}"


def _scalar(value: str | int | tuple[int, ...]) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and not isinstance(value, _Keyword):
        return quoted(value)
    return str(value)


def quoted(text: str) -> str:
    """A string of text format: printable ASCII as it is, every other byte of its UTF-8 in octal."""
    escapes = {ord('"'): '\\"', ord("\\"): "\\\\"}
    content = text.encode("utf-8", "backslashreplace")
    characters = (escapes.get(byte, chr(byte) if 32 <= byte < 127 else f"\\{byte:03o}") for byte in content)
    return f'"{"".join(characters)}"'

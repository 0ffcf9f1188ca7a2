"""The text of a configuration, checked with the schema of the server's own client."""

from __future__ import annotations

import itertools

from fastflow.export.model_config import HEADER, ServedTensor, Serving, model_config, quoted
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st

from tests.export.served import SCHEMA


@given(max_batch=st.integers(1, 5000))
def test_batch_sizes(max_batch):
    sizes = Serving(max_batch, 1, "auto").batch_sizes
    assert list(sizes) == sorted(set(sizes)) and sizes[0] >= 1 and sizes[-1] == max_batch
    # A full queue of any length gives batches of more than half of it, or of the largest.
    assert all(larger <= 2 * smaller for smaller, larger in itertools.pairwise(sizes))


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_any_text_can_be_a_string(text):
    line = f"string_value: {quoted(text)}"
    assert line.isascii() and line.isprintable()
    assert text_format.Parse(line, SCHEMA.ModelParameter()).string_value == text


def test_comments_say_what_labels_mean():
    outputs = [ServedTensor("log_probs", "TYPE_FP64", (3,))]
    text = model_config(
        "magic_flow_score", "score", [], outputs, Serving(4, 1, "auto"), {"prior": [0.5, 0.5]}
    )
    lines = text.splitlines()
    assert lines[0] == HEADER
    assert "uniform prior" in " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
    assert max(map(len, lines[:4])) <= 130
    config = text_format.Parse(text, SCHEMA.ModelConfig())
    assert config.output[0].label_filename == "labels.txt"
    assert config.parameters["fastflow.prior"].string_value == "[0.5, 0.5]"

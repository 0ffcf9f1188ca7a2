"""The export as a folder: what is in it, and that nothing is left where it fails."""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from fastflow.export import onnx as exporter
from fastflow.export.graphs import GRAPHS
from fastflow.export.onnx import NOT_IN_GRAPHS, export_onnx

from fastflow import MagicFlow
from fastflow._files import temporary_name
from fastflow.errors import CheckpointError, ExportError, OutputFolderError
from fastflow.models.scoring import LabelScorer
from tests.export.layouts import short

ALL = {"export.json", "runtime.pyz", "weights.data", *(f"{name}.onnx" for name in GRAPHS)}
SHAPES = {
    "score": ({"image": ("batch", 1, 16, 16)}, {"log_probs": ("batch", 2)}),
    "latent": (
        {"image": ("batch", 1, 16, 16), "label": ("batch",)},
        {"z": ("batch", 256), "logdet": ("batch",)},
    ),
    "sample": ({"z": ("batch", 256), "label": ("batch",)}, {"image": ("batch", 1, 16, 16)}),
    "attribution": (
        {"image": ("batch", 1, 16, 16), "label": ("batch",)},
        {"map": ("batch", 1, 16, 16), "constant": ("batch",)},
    ),
}
# No graph may compute these: they are constants.
SOLVES = {"Det", "Inverse", "MatrixInverse", "LogDet", "TriangularSolve"}


# A small model, for what does not depend on its size.
SMALL = Path(__file__).parents[1] / "fixtures" / "v0" / "model"


@functools.cache
def session(folder: Path, name: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def model(model_folder: Path) -> MagicFlow:
    """The model of `exported`. Do not change it."""
    return MagicFlow.load(model_folder)


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 1, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1


def check_dimensions(path: Path, scratch: Path) -> None:
    """Run a graph with all its values as outputs: each named dimension must have one size.

    ONNX Runtime puts tensors of one stated shape in the same memory; parts are called with images, and with
    pairs of an image and a label.
    """
    model = onnx.load(path)
    values = list(model.graph.value_info)
    del model.graph.output[:]
    model.graph.output.extend(values)
    onnx.save(model, scratch / path.name)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_mem_reuse = False
    run = onnxruntime.InferenceSession(scratch / path.name, options, providers=["CPUExecutionProvider"])
    kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    inputs = {entry.name: np.zeros([2, *entry.shape[1:]], kinds[entry.type]) for entry in run.get_inputs()}
    sizes: dict[str, set[int]] = {"batch": {2}}
    for value, got in zip(values, run.run(None, inputs), strict=True):
        if not value.type.tensor_type.HasField("shape"):
            continue
        for stated, size in zip(value.type.tensor_type.shape.dim, got.shape, strict=True):
            if stated.HasField("dim_param"):
                sizes.setdefault(stated.dim_param, set()).add(size)
            elif stated.HasField("dim_value"):
                assert stated.dim_value == size, value.name
    assert all(len(seen) == 1 for seen in sizes.values()), sizes
    # Names that parts were traced with stand for other sizes in every call, even where these happen to agree.
    assert all("batch" in name for name in sizes), sizes.keys()


def test_the_folder_holds_what_its_document_lists(exported, model_folder):
    assert {path.name for path in exported.iterdir()} == ALL
    document = json.loads((exported / "export.json").read_text())
    assert set(document["sha256"]) == ALL - {"export.json", "runtime.pyz"}
    for name, digest in document["sha256"].items():
        assert hashlib.sha256((exported / name).read_bytes()).hexdigest() == digest
    config = json.loads((model_folder / "config.json").read_text())
    assert document["weights_sha256"] == config["sha256"]
    assert (
        document["model_hash"] == hashlib.sha256((model_folder / "config.json").read_bytes()).hexdigest()[:16]
    )
    assert document["config"] == config["config"]
    assert document["preprocess"] == config["metadata"]["preprocess"]
    assert document["images"] == config["metadata"]["images"] != {}
    assert document["class_names"] == ["flat", "striped"]
    assert document["temperature"] == 5.0
    assert document["prior"] == [0.5, 0.5]
    assert document["parity"]["passed"]


@pytest.mark.parametrize("name", GRAPHS)
def test_a_named_dimension_has_one_size(exported, name, tmp_path):
    check_dimensions(exported / f"{name}.onnx", tmp_path)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_says_what_it_is(exported, name):
    model = onnx.load(exported / f"{name}.onnx", load_external_data=False)
    assert [(one.domain, one.version) for one in model.opset_import] == [("", 21)]
    assert model.ir_version == 10
    assert not model.functions
    found = {entry.key: entry.value for entry in model.metadata_props}
    document = json.loads((exported / "export.json").read_text())
    assert found["graph"] == name
    assert json.loads(found["weights"]) == {
        "file": "weights.data",
        "sha256": document["sha256"]["weights.data"],
    }
    for key in set(document) - set(NOT_IN_GRAPHS):
        value = document[key]
        assert (found[key] if isinstance(value, str) else json.loads(found[key])) == value
    assert found.keys().isdisjoint({"sha256", "graphs", "validation"})


@pytest.mark.parametrize("name", GRAPHS)
def test_batches_are_dynamic_and_nothing_is_solved(exported, name):
    model = onnx.load(exported / f"{name}.onnx", load_external_data=False)
    for values, wanted in zip((model.graph.input, model.graph.output), SHAPES[name], strict=True):
        dims = {
            v.name: tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in values
        }
        assert dims == wanted
    kinds = {node.op_type for node in model.graph.node}
    assert kinds.isdisjoint(SOLVES | {"GatherND", "SequenceAt", "If", "Loop", "Scan"})
    assert {"Gelu", "InstanceNormalization", "Conv"} <= kinds
    assert {node.domain for node in model.graph.node} == {""}


def test_log_likelihoods_are_summed_wide(exported):
    model = onnx.load(exported / "score.onnx", load_external_data=False)
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.output)}
    sums = [node for node in model.graph.node if node.op_type == "ReduceSum"]
    assert sums
    assert {kinds[node.output[0]] for node in sums} == {onnx.TensorProto.DOUBLE}


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_scores_are_those_of_the_model(exported, model, batch):
    x = images(batch)
    (got,) = session(exported, "score").run(None, {"image": x.numpy()})
    want = LabelScorer(model)(x).numpy()
    assert got.dtype == np.float64 and got.shape == (batch, 2)
    np.testing.assert_allclose(got, want, atol=1e-3)
    assert np.ptp(got - want, axis=1).max() < 5e-4


def test_samples_are_those_of_the_model_and_the_inverse_of_the_latent(exported, model):
    x, y = images(4), torch.tensor([0, 1, 1, 0])
    z, logdet = session(exported, "latent").run(None, {"image": x.numpy(), "label": y.numpy()})
    with torch.no_grad():
        want_z, want_logdet = model(x, y)
    np.testing.assert_allclose(z, want_z, atol=1e-4)
    np.testing.assert_allclose(logdet, want_logdet, atol=1e-3)
    (back,) = session(exported, "sample").run(None, {"z": z, "label": y.numpy()})
    np.testing.assert_allclose(back, x, atol=1e-4)


def test_maps_add_up_to_the_log_likelihood(exported, model):
    x, y = images(3), torch.tensor([0, 1, 1])
    attribution, constant = session(exported, "attribution").run(
        None, {"image": x.numpy(), "label": y.numpy()}
    )
    with torch.no_grad():
        want, _ = model.attribution(x, y)
        total = model.log_prob(x, y)
    np.testing.assert_allclose(attribution, want, atol=1e-4)
    np.testing.assert_allclose(
        attribution.astype(np.float64).sum(axis=(1, 2, 3)) + constant, total, atol=2e-3
    )


def test_weights_are_stored_once_and_found_after_a_move(exported, tmp_path):
    places: dict[str, set[tuple[str, str]]] = {}
    for name in GRAPHS:
        model = onnx.load(exported / f"{name}.onnx", load_external_data=False)
        entries = [
            {e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data
        ]
        assert {entry["location"] for entry in entries} == {"weights.data"}
        places[name] = {(entry["offset"], entry["length"]) for entry in entries}
    size = (exported / "weights.data").stat().st_size
    assert sum(int(length) for _, length in set.union(*places.values())) <= size
    assert len(set.intersection(*places.values())) > 0.8 * max(map(len, places.values()))
    moved = tmp_path / "elsewhere"
    shutil.copytree(exported, moved)
    (got,) = session(moved, "score").run(None, {"image": images(2).numpy()})
    (want,) = session(exported, "score").run(None, {"image": images(2).numpy()})
    assert np.array_equal(got, want)


def test_an_export_is_smaller_than_its_checkpoint(exported, model_folder):
    # Only those rows of the heads are stored that are used.
    checkpoint = next(model_folder.glob("*.safetensors")).stat().st_size
    assert (exported / "weights.data").stat().st_size < 0.9 * checkpoint


# -- failures, without tracing -------------------------------------------------------------------------------


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make tracing give a graph of one node at once."""
    import onnx_ir as ir

    def trace(graph, functions, opset):
        given, constant = (
            ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT)) for name in ("image", "weight")
        )
        given.shape = ir.Shape(["batch", 1, 16, 16])
        constant.const_value = ir.tensor(np.zeros((1, 16, 16, 16), np.float32), name="weight")
        constant.shape = ir.Shape([1, 16, 16, 16])
        node = ir.Node("", "Add", [given, constant])
        built = ir.Graph(
            [given], node.outputs, nodes=[node], initializers=[constant], opset_imports={"": opset}, name="g"
        )
        return ir.Model(built, ir_version=10)

    monkeypatch.setattr(exporter, "trace", trace)


@pytest.mark.usefixtures("traced")
class TestFolders:
    def test_a_chosen_prior_and_chosen_graphs(self, tmp_path):
        done = export_onnx(SMALL, tmp_path / "out", ["score", "latent"], prior=[0.25, 0.75], check=False)
        assert done.parity is None
        document = json.loads((tmp_path / "out" / "export.json").read_text())
        assert document["prior"] == [0.25, 0.75] and document["parity"] is None
        assert set(document["graphs"]) == {"score", "latent"}
        assert set(done.sizes) == {"export.json", "runtime.pyz", "weights.data", "score.onnx", "latent.onnx"}
        assert list(tmp_path.iterdir()) == [tmp_path / "out"]

    def test_a_folder_is_only_replaced_when_asked(self, tmp_path):
        out = tmp_path / "out"
        export_onnx(SMALL, out, ["score", "latent"], check=False)
        with pytest.raises(
            OutputFolderError, match=r"out: holds an earlier export; replace it \(--overwrite\)"
        ):
            export_onnx(SMALL, out, ["score"], check=False)
        assert (out / "latent.onnx").exists()
        export_onnx(SMALL, out, ["score"], check=False, overwrite=True)
        assert not (out / "latent.onnx").exists()
        assert list(tmp_path.iterdir()) == [out]

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_folder_of_other_files_is_never_replaced(self, tmp_path, overwrite):
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(
            OutputFolderError, match=r"holds other files, such as 'notes\.txt'; an export needs a folder"
        ):
            export_onnx(SMALL, tmp_path, ["score"], check=False, overwrite=overwrite)
        with pytest.raises(OutputFolderError, match=r"notes\.txt: must be a folder, it is a file"):
            export_onnx(SMALL, tmp_path / "notes.txt", check=False, overwrite=overwrite)
        assert (tmp_path / "notes.txt").read_text() == "mine"

    def test_an_empty_folder_is_taken(self, tmp_path):
        (tmp_path / "out").mkdir()
        export_onnx(SMALL, tmp_path / "out", ["score"], check=False)
        assert (tmp_path / "out" / "score.onnx").exists()

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_graphs_that_differ_are_not_kept(self, tmp_path, monkeypatch, overwrite):
        from fastflow.export.verify import Parity

        out = tmp_path / "out"
        if overwrite:
            export_onnx(SMALL, out, ["score"], check=False)
        before = {path.name: path.read_bytes() for path in out.iterdir()} if overwrite else None
        bad = Parity(
            3, "given", 0.02, {"score": {"log_odds_error": 0.5, "agreement": 1.0}}, {}, 1.0, "CPU", "1"
        )
        monkeypatch.setattr(exporter, "verify", lambda *args, **kwargs: bad)
        with pytest.raises(
            ExportError, match=r"out: not written, because the graphs differ .* off by 0\.5 nats, 0\.02 are"
        ):
            export_onnx(SMALL, out, ["score"], overwrite=overwrite)
        assert list(tmp_path.iterdir()) == ([out] if overwrite else [])
        assert before is None or {path.name: path.read_bytes() for path in out.iterdir()} == before

    def test_nothing_is_left_of_an_export_that_breaks_off(self, tmp_path, monkeypatch):
        def broken(path):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(exporter, "write_bundle", broken)
        with pytest.raises(OSError, match="No space left"):
            export_onnx(SMALL, tmp_path / "out", ["score"], check=False)
        assert list(tmp_path.iterdir()) == []

    def test_a_place_is_held_while_it_is_written(self, tmp_path, monkeypatch):
        write_bundle = exporter.write_bundle

        def second(path):
            with pytest.raises(OutputFolderError, match=r"out: another run is writing here \(process"):
                export_onnx(SMALL, tmp_path / "out", ["score"], check=False)
            write_bundle(path)

        monkeypatch.setattr(exporter, "write_bundle", second)
        export_onnx(SMALL, tmp_path / "out", ["score"], check=False)
        assert list(tmp_path.iterdir()) == [tmp_path / "out"]

    def test_a_file_system_without_locks(self, tmp_path, monkeypatch):
        def flock(handle, how):
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

        monkeypatch.setattr(fcntl, "flock", flock)
        with pytest.raises(OutputFolderError, match=r"no locks .* --no-lock goes on without one"):
            export_onnx(SMALL, tmp_path / "out", ["score"], check=False)
        assert list(tmp_path.iterdir()) == []
        export_onnx(SMALL, tmp_path / "out", ["score"], check=False, lock=False)
        assert (tmp_path / "out" / "score.onnx").exists()

    def test_what_a_killed_export_left_is_cleared(self, tmp_path):
        export_onnx(SMALL, tmp_path / "out", ["score"], check=False)
        (tmp_path / temporary_name("out") / "new").mkdir(parents=True)
        (tmp_path / "out").rename(tmp_path / temporary_name("out", "old"))
        # The earlier export was moved aside when the process was killed, and is there again.
        with pytest.raises(OutputFolderError, match="holds an earlier export"):
            export_onnx(SMALL, tmp_path / "out", ["score"], check=False)
        assert list(tmp_path.iterdir()) == [tmp_path / "out"]

    def test_the_same_model_gives_the_same_bytes(self, tmp_path):
        for name in "ab":
            export_onnx(SMALL, tmp_path / name, ["score"], check=False)
        for path in (tmp_path / "a").iterdir():
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name

    def test_small_tensors_stay_in_the_graph(self, tmp_path, monkeypatch):
        monkeypatch.setattr(exporter, "EXTERNAL_BYTES", 1 << 30)
        export_onnx(SMALL, tmp_path / "out", ["score"], check=False)
        assert not (tmp_path / "out" / "weights.data").exists()
        model = onnx.load(tmp_path / "out" / "score.onnx")
        assert json.loads({entry.key: entry.value for entry in model.metadata_props}["weights"]) is None


def test_refuses(tmp_path, monkeypatch):
    out = tmp_path / "out"
    for arguments, words in (
        ({"graphs": []}, "graphs must be some of score, sample, latent, attribution, each once, got none"),
        ({"graphs": ["score", "decode"]}, "graphs must be some of .*, got score, decode"),
        ({"graphs": ["score", "score"]}, "graphs must be some of .* each once"),
        ({"precision": "float16"}, "precision must be one of float32, mixed, got 'float16'"),
        ({"opset": 17}, "opset must be 21, got 17"),
        ({"prior": [0.5, 0.6]}, "prior must be 2 probabilities that sum to 1"),
    ):
        with pytest.raises(ValueError, match=words):
            export_onnx(SMALL, out, **arguments)
    with pytest.raises(CheckpointError, match="nowhere is not a model folder: no such folder"):
        export_onnx(tmp_path / "nowhere", out)
    monkeypatch.setattr(torch, "__version__", "2.7.1+cpu")
    with pytest.raises(ExportError, match=r"needs PyTorch 2\.8 or newer, this is 2\.7\.1"):
        export_onnx(SMALL, out)
    assert list(tmp_path.iterdir()) == []


def test_tampered_weights_are_not_exported(tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(SMALL, copy)
    weights = next(copy.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"has sha256 .*, but config\.json records"):
        export_onnx(copy, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_batch_that_became_a_number_is_an_error():
    import onnx_ir as ir
    from fastflow.export._trace import _check_batch

    value = ir.Value(name="image", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([3, 1]))
    node = ir.Node("", "Identity", [value])
    model = ir.Model(ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 21}), ir_version=10)
    with pytest.raises(
        RuntimeError, match="image of the graph must have a first dimension 'batch', it has shape"
    ):
        _check_batch(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"task": "generation"},
        {"condition_from_step": 1, "share_halves": False},
        {"input_shape": (1, 20, 12), "num_classes": 1},
    ],
    ids=str,
)
def test_other_layouts_pass_the_comparison(changes, tmp_path):
    torch.manual_seed(1)
    config = short(**{"num_classes": 3, **changes})
    model = MagicFlow(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.initialize(torch.rand(8, *config.input_shape) * 2 - 1)
    model.eval().save(tmp_path / "model")
    done = export_onnx(tmp_path / "model", tmp_path / "out")
    assert done.parity is not None and done.parity.passed
    assert set(done.parity.graphs) == set(GRAPHS)
    for name in GRAPHS:
        check_dimensions(tmp_path / "out" / f"{name}.onnx", tmp_path)

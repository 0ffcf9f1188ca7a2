"""Model repositories, checked by doing with them what the server does."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from fastflow.export.triton_server import GRAPHS, write_model_repository
from onnx import TensorProto, numpy_helper

from fastflow.errors import ExportError, OutputFolderError
from tests.export.served import (
    CONSTANTS,
    NAMES,
    SCHEMA,
    SHAPE,
    expected_config,
    make_export,
    make_graph,
    parse,
)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """An export to tamper with."""
    return make_export(tmp_path / "export")


@pytest.fixture(scope="module")
def shared_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export. Do not write into it."""
    return make_export(tmp_path_factory.mktemp("served") / "export")


@pytest.fixture(scope="module")
def repository(shared_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository of `shared_export`. Do not write into it."""
    return write_model_repository(shared_export, tmp_path_factory.mktemp("served") / "models", max_batch=5)


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize(
    ("options", "sizes", "max_batch", "count", "kind"),
    [
        ({}, (2, 4, 8, 16), 16, 1, "KIND_AUTO"),
        ({"max_batch": 6, "instances": 3, "device": "cuda"}, (2, 4, 6), 6, 3, "KIND_GPU"),
        ({"max_batch": 1, "device": "cpu"}, (1,), 1, 1, "KIND_CPU"),
    ],
)
def test_every_field_of_a_configuration(shared_export, tmp_path, options, sizes, max_batch, count, kind):
    repository = write_model_repository(shared_export, tmp_path / "models", **options)
    for graph in GRAPHS:
        wanted = expected_config(graph, sizes, max_batch, count, kind)
        assert parse(repository / f"magic_flow_{graph}") == wanted, graph


def test_files_of_a_repository(shared_export, tmp_path):
    export = shared_export
    repository = write_model_repository(export, tmp_path / "new" / "models", name="scans")
    assert repository == tmp_path / "new" / "models"
    weights = {"score": ["1/weights.data", "labels.txt"], "latent": ["1/weights.data"]}
    assert set(content(repository)) == {
        f"scans_{graph}/{file}"
        for graph in GRAPHS
        for file in ("1/model.onnx", "config.pbtxt", *weights.get(graph, []))
    }
    for graph in GRAPHS:
        version = repository / f"scans_{graph}" / "1"
        assert (version / "model.onnx").read_bytes() == (export / f"{graph}.onnx").read_bytes()
    assert (repository / "scans_latent" / "1" / "weights.data").read_bytes() == (
        export / "weights.data"
    ).read_bytes()
    # The server reads labels so.
    labels = (repository / "scans_score" / "labels.txt").read_text(encoding="utf-8")
    assert labels.split("\n") == [*NAMES, ""]


def test_others_can_read_it(shared_export, tmp_path):
    umask = os.umask(0o022)
    try:
        repository = write_model_repository(shared_export, tmp_path / "models")
    finally:
        os.umask(umask)
    for path in (repository, *repository.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644)


def as_the_backend_does(folder: Path, requests: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Requests of (1, *dims) through a model: joined, and reshaped as the configuration says."""
    config = parse(folder)
    session = onnxruntime.InferenceSession(folder / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = {}
    for tensor in config.input:
        joined = np.concatenate([request[tensor.name] for request in requests])
        assert joined.shape[1:] == tuple(tensor.dims)
        feeds[tensor.name] = joined.reshape(
            len(joined), *(tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims)
        )
    names = [tensor.name for tensor in config.output]
    answers = session.run(names, feeds)
    result = {}
    for tensor, answer in zip(config.output, answers, strict=True):
        assert answer.shape[1:] == tuple(tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims)
        result[tensor.name] = answer.reshape(len(answer), *tensor.dims)
    return result


NUMPY = {"TYPE_FP32": np.float32, "TYPE_FP64": np.float64, "TYPE_INT64": np.int64}


@pytest.mark.parametrize("graph", GRAPHS)
def test_warm_up_requests_run(repository, graph):
    folder = repository / f"magic_flow_{graph}"
    config = parse(folder)
    assert [warmup.batch_size for warmup in config.model_warmup] == [1, 2, 4, 5]
    for warmup in config.model_warmup:
        request = {}
        for name, value in warmup.inputs.items():
            request[name] = np.zeros((1, *value.dims), NUMPY[SCHEMA.DataType.Name(value.data_type)])
        answers = as_the_backend_does(folder, [request] * warmup.batch_size)
        for tensor in config.output:
            answer = answers[tensor.name]
            assert answer.shape == (warmup.batch_size, *tensor.dims)
            assert answer.dtype == NUMPY[SCHEMA.DataType.Name(tensor.data_type)]


def test_requests_give_what_the_export_gives(shared_export, repository):
    images = np.random.default_rng(1).uniform(-1, 1, (3, *SHAPE)).astype(np.float32)
    labels = np.array([2, 0, 3])
    requests = [
        {"image": image[None], "label": label.reshape(1, 1)}
        for image, label in zip(images, labels, strict=True)
    ]
    for graph in ("score", "latent"):
        answers = as_the_backend_does(repository / f"magic_flow_{graph}", requests)
        session = onnxruntime.InferenceSession(
            shared_export / f"{graph}.onnx", providers=["CPUExecutionProvider"]
        )
        feeds = {"image": images} | ({"label": labels} if graph == "latent" else {})
        for output, right in zip(session.get_outputs(), session.run(None, feeds), strict=True):
            np.testing.assert_array_equal(answers[output.name].reshape(right.shape), right)


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_model_stands_alone(repository, tmp_path, graph):
    moved = Path(shutil.copytree(repository / f"magic_flow_{graph}", tmp_path / "moved", symlinks=True))
    # `onnx` loads no file with several hard links.
    for path in (repository / f"magic_flow_{graph}" / "1").iterdir():
        assert path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1
    weights = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in onnx.load(moved / "1" / "model.onnx").graph.initializer
    }
    assert weights.keys() == CONSTANTS[graph].keys()
    for name, value in CONSTANTS[graph].items():
        np.testing.assert_array_equal(weights[name], value)


def test_only_the_graphs_of_the_export(tmp_path):
    export = make_export(tmp_path / "export", kept=("attribution",))
    repository = write_model_repository(export, tmp_path / "models")
    assert [path.name for path in repository.iterdir()] == ["magic_flow_attribution"]


# -- bad input: nothing is left beside the export ------------------------------------------------------------


def fails(error: type[Exception], match: str, export: Path, repository: Path, **options: Any) -> None:
    before = content(repository.parent), sorted(path.name for path in repository.parent.iterdir())
    with pytest.raises(error, match=match):
        write_model_repository(export, repository, **options)
    assert before == (content(repository.parent), sorted(path.name for path in repository.parent.iterdir()))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"name": "a/b"}, "name must be of letters.*'a/b'"),
        ({"name": ""}, "name must be"),
        ({"name": "../up"}, "name must be"),
        ({"max_batch": 0}, "max_batch must be a whole number of 1 or more, got 0"),
        ({"max_batch": True}, "max_batch .*got True"),
        ({"max_batch": 2.0}, "max_batch .*got 2.0"),
        ({"max_batch": 2**31}, "max_batch"),
        ({"instances": 0}, "instances must be a whole number of 1 or more, got 0"),
        ({"device": "gpu"}, "device must be one of auto, cpu, cuda, got 'gpu'"),
    ],
)
def test_arguments_out_of_range(export, tmp_path, options, match):
    fails(ValueError, match, export, tmp_path / "models", **options)


def test_not_an_export(export, tmp_path):
    repository = tmp_path / "models"
    fails(ExportError, "missing is not an export folder: no such folder", tmp_path / "missing", repository)
    (tmp_path / "empty").mkdir()
    fails(ExportError, r"no export\.json in it", tmp_path / "empty", repository)
    fails(ExportError, "is not an export folder: no such folder", export / "score.onnx", repository)
    (export / "export.json").write_bytes(b"{\xff")
    fails(ExportError, r"export\.json cannot be read", export, repository)


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"format": 2}'])
def test_a_document_of_another_format(export, tmp_path, text):
    (export / "export.json").write_text(text, encoding="utf-8")
    fails(ExportError, "must have format 1, got", export, tmp_path / "models")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"graphs": None, "prior": None}, "lacks prior, graphs"),
        ({"scaling": None}, "lacks scaling"),
        ({"graphs": {}}, "graphs must be some of score, latent, sample, attribution, got none"),
        ({"graphs": {"../score": "score.onnx"}}, r"graphs must be some of .*, got \.\./score"),
        ({"graphs": {"score": 3}}, "graphs and sha256 must be files of the folder"),
        ({"graphs": ["score"]}, r"export\.json is not usable"),
        ({"sha256": {"score.onnx": "0"}}, r"score\.onnx has sha256 [0-9a-f]{64}, but export\.json records 0"),
        (
            {"sha256": {"other": "0"}},
            r"must record the hash of each file of its folder, has none of 'score\.onnx'",
        ),
        ({"graphs": {"score": "../export/score.onnx"}}, "graphs and sha256 must be files of the folder"),
        ({"class_names": []}, "class_names must be a list of names"),
        ({"class_names": ["a", 3, "b", "c"]}, "class_names must be a list of names"),
        (
            {"class_names": ["a", "b\nc", "d", "e"]},
            r"a class name must be one line to be a label, got 'b\\nc'",
        ),
        ({"class_names": ["a", "b\r", "d", "e"]}, "a class name must be one line"),
        (
            {"class_names": ["a", "b"], "prior": [0.5, 0.5]},
            r"one number for each of the 2 classes, gives log_probs \[4\]",
        ),
    ],
)
def test_documents_that_do_not_fit(tmp_path, changes, match):
    fails(ExportError, match, make_export(tmp_path / "export", **changes), tmp_path / "models")


def test_a_recorded_path_leads_nowhere_else(tmp_path):
    digest = hashlib.sha256(b"secret").hexdigest()
    (tmp_path / "secret").write_bytes(b"secret")
    export = make_export(tmp_path / "export", graphs={"score": "../secret"}, sha256={"../secret": digest})
    fails(ExportError, "must be files of the folder", export, tmp_path / "models")


@pytest.mark.parametrize("file", ["weights.data", "latent.onnx"])
def test_changed_files(export, tmp_path, file):
    changed = bytearray((export / file).read_bytes())
    changed[-1] ^= 1
    (export / file).write_bytes(changed)
    fails(ExportError, rf"{file} has sha256 [0-9a-f]+, but export\.json records", export, tmp_path / "models")
    (export / file).unlink()
    fails(ExportError, f"{file} cannot be read", export, tmp_path / "models")


def replace_graph(export: Path, model: bytes) -> None:
    """Another score graph, under a hash that says it is right."""
    (export / "score.onnx").write_bytes(model)
    document = json.loads((export / "export.json").read_text(encoding="utf-8"))
    document["sha256"]["score.onnx"] = hashlib.sha256(model).hexdigest()
    (export / "export.json").write_text(json.dumps(document), encoding="utf-8")


def test_graphs_that_cannot_be_served(export, tmp_path):
    repository = tmp_path / "models"
    replace_graph(export, b"\xff\xff")
    fails(ExportError, r"score\.onnx is not an ONNX graph", export, repository)
    replace_graph(export, make_graph("score", batch=1).SerializeToString())
    fails(
        ExportError,
        r"image must have a named batch dimension and fixed others, got \(1, 1, 2, 3\)",
        export,
        repository,
    )
    model = make_graph("score")
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_param = "width"
    replace_graph(export, model.SerializeToString())
    fails(ExportError, r"got \(batch, 1, 2, width\)", export, repository)
    model = make_graph("score")
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    replace_graph(export, model.SerializeToString())
    fails(
        ExportError,
        r"log_probs must have a named batch dimension and fixed others, got \(\)",
        export,
        repository,
    )
    model = make_graph("score")
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    replace_graph(export, model.SerializeToString())
    fails(ExportError, "log_probs must be float32, float64 or int64, got FLOAT16", export, repository)


def test_an_occupied_folder(export, tmp_path):
    repository = tmp_path / "models"
    repository.write_text("x")
    fails(OutputFolderError, "models: must be a folder, it is a file", export, repository, overwrite=True)
    repository.unlink()
    (repository / "magic_flow_score").mkdir(parents=True)
    fails(OutputFolderError, "other files, such as 'magic_flow_score'", export, repository, overwrite=True)
    config = repository / "magic_flow_score" / "config.pbtxt"
    config.write_text('name: "magic_flow_score"\n', encoding="utf-8")
    for overwrite in (False, True):
        # Somebody else wrote a model of the same name.
        fails(
            OutputFolderError,
            "other files, such as 'magic_flow_score'",
            export,
            repository,
            overwrite=overwrite,
        )
    config.unlink()
    (repository / "magic_flow_score").rmdir()
    # An empty folder is as good as none.
    write_model_repository(export, repository)
    fails(OutputFolderError, r"an earlier model repository; replace it \(--overwrite\)", export, repository)
    fails(
        OutputFolderError,
        "other files, such as 'magic_flow_attribution'",
        export,
        repository,
        name="other",
        overwrite=True,
    )
    (repository / "resnet").mkdir()
    fails(OutputFolderError, "other files, such as 'resnet'", export, repository, overwrite=True)


def test_overwriting(export, tmp_path):
    repository = write_model_repository(export, tmp_path / "models")
    fewer = make_export(tmp_path / "fewer", kept=("score", "sample"))
    write_model_repository(fewer, repository, max_batch=2, overwrite=True)
    assert sorted(path.name for path in repository.iterdir()) == ["magic_flow_sample", "magic_flow_score"]
    assert parse(repository / "magic_flow_score").max_batch_size == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "fewer", "models"]


def test_an_earlier_repository_survives_a_failure(export, tmp_path):
    repository = write_model_repository(export, tmp_path / "models")
    (export / "sample.onnx").write_bytes(b"changed")
    fails(ExportError, "sample.onnx has sha256", export, repository, max_batch=2, overwrite=True)
    assert parse(repository / "magic_flow_score").max_batch_size == 16


@pytest.mark.parametrize(
    ("error", "raised", "match"),
    [
        (OSError("busy"), OutputFolderError, "busy.*mounted"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
    ],
)
def test_an_earlier_repository_is_put_back(export, tmp_path, monkeypatch, error, raised, match):
    repository = write_model_repository(export, tmp_path / "models")
    rename = os.rename

    def fail_to_place(source, target):
        if Path(source).name == "new":
            raise error
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_to_place)
    fails(raised, match, export, repository, overwrite=True)


def test_a_link_to_a_repository_stays_one(export, tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    assert write_model_repository(export, tmp_path / "link") == tmp_path / "target"
    assert (tmp_path / "link").is_symlink() and (
        tmp_path / "link" / "magic_flow_score" / "labels.txt"
    ).is_file()

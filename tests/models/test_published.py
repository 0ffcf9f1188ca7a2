"""The authors' weights and outputs, reproduced."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from fastflow import FlowConfig, MagicFlow, kernels

FIXTURES = Path(__file__).parents[1] / "fixtures"
TASKS = ["classification", "generation"]


def reference(task):
    return np.load(FIXTURES / f"magicflow_{task}_small.npz")


def config_of(data, task, **changes):
    values = {
        "num_classes": int(data["config/num_classes"]),
        "input_shape": tuple(data["config/input_shape"]),
        "task": task,
        "masks": tuple(str(name) for name in data["config/mask_types"]),
        "squeeze_before": tuple(data["config/squeeze_layers"]),
        "split_after": tuple(data["config/split_layers"]),
        "widths": tuple(tuple(row) for row in data["config/filters"]),
        "norm": "batch" if task == "generation" else "group",
    }
    return FlowConfig(**{**values, **changes})


def state_of(data):
    return {
        name.removeprefix("state/"): torch.from_numpy(data[name])
        for name in data.files
        if name.startswith("state/")
    }


def model_of(data, task, **changes):
    return MagicFlow.from_published(
        state_of(data), config_of(data, task, **changes), data["data/custom_mask"]
    )


def relative(got, want):
    return float(np.abs(got.double().numpy() - want).max() / np.abs(want).max())


@pytest.mark.parametrize("task", TASKS)
def test_float64_matches_to_1e9(task):
    data = reference(task)
    model = model_of(data, task).double()
    x, y = torch.from_numpy(data["data/x"]).double(), torch.from_numpy(data["data/labels"])
    with torch.no_grad():
        assert relative(model.log_prob_all(x), data["expected/log_likelihood_all_labels"]) < 1e-9
        z, logdet = model(x, y)
        assert relative(z, data["expected/z"]) < 1e-9
        assert relative(logdet, data["expected/logdet"]) < 1e-9
        sample = model.inverse(
            torch.from_numpy(data["data/z_sample"]).double(), torch.from_numpy(data["data/sample_labels"])
        )
        assert relative(sample, data["expected/x_sample"]) < 1e-9


@pytest.mark.parametrize("task", TASKS)
def test_float32_log_likelihoods_match_to_1e5(task):
    data = reference(task)
    model = model_of(data, task)
    with torch.no_grad():
        got = model.log_prob_all(torch.from_numpy(data["data/x"]))
        want = data["expected/log_likelihood_all_labels"]
        assert np.abs(got.numpy() / want - 1).max() < 1e-5
        # What decides is the gap between labels: a small fraction of a nat.
        gaps = got.double().numpy()[:, :1] - got.double().numpy()
        assert np.abs(gaps - (want[:, :1] - want)).max() < 1e-3
        sample = model.inverse(
            torch.from_numpy(data["data/z_sample"]), torch.from_numpy(data["data/sample_labels"])
        )
        assert np.abs(sample.numpy() - data["expected/x_sample"]).max() < 1e-4


def scores_of_truth(data):
    """Expected log p(x|y) of each image under its own label."""
    labels = data["data/labels"]
    return data["expected/log_likelihood_all_labels"][np.arange(len(labels)), labels]


def log_prob_of_truth(model, data, call=None):
    x = torch.from_numpy(data["data/x"]).to(model.dtype)
    return (call or model.log_prob)(x, torch.from_numpy(data["data/labels"])).detach()


def test_reversible_mode_matches_and_so_do_its_gradients():
    # The authors' generation weights have batch statistics, which the mode refuses.
    data = reference("classification")
    normal, reversible = (
        model_of(data, "classification", reversible=flag).double() for flag in (False, True)
    )
    assert relative(log_prob_of_truth(reversible, data), scores_of_truth(data)) < 1e-9
    for model in (normal, reversible):
        model.log_prob(
            torch.from_numpy(data["data/x"]).double(), torch.from_numpy(data["data/labels"])
        ).sum().backward()
    pairs = [
        (a.grad, b.grad)
        for a, b in zip(normal.parameters(), reversible.parameters(), strict=True)
        if a.grad is not None
    ]
    top = max(float(a.abs().max()) for a, _ in pairs)
    assert len(pairs) > 100
    assert all(float((a - b).abs().max()) < 1e-8 * max(float(a.abs().max()), 1e-6 * top) for a, b in pairs)


@pytest.mark.parametrize("task", TASKS)
def test_the_reference_backend_matches(task):
    data = reference(task)
    kernels.set_backend("reference")
    try:
        assert relative(log_prob_of_truth(model_of(data, task).double(), data), scores_of_truth(data)) < 1e-9
    finally:
        kernels.set_backend("auto")


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_compiled_graphs_match(task):
    data = reference(task)
    model = model_of(data, task).double()
    with torch.no_grad():
        got = log_prob_of_truth(
            model, data, torch.compile(model.log_prob, fullgraph=True, backend="aot_eager")
        )
    assert relative(got, scores_of_truth(data)) < 1e-9


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles where there is a GPU")
@pytest.mark.parametrize("task", TASKS)
def test_kernels_in_the_interpreter_match(task, monkeypatch):
    data = reference(task)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    few = {name: data[name][:2] for name in ("data/x", "data/labels", "expected/log_likelihood_all_labels")}
    model = model_of(data, task).double()
    with torch.no_grad():
        assert relative(log_prob_of_truth(model, few), scores_of_truth(few)) < 1e-9


@pytest.mark.parametrize("task", TASKS)
def test_attribution_adds_up(task):
    data = reference(task)
    model = model_of(data, task).double()
    x, y = torch.from_numpy(data["data/x"]).double(), torch.from_numpy(data["data/labels"])
    with torch.no_grad():
        spread, const = model.attribution(x, y)
        assert (spread.sum(dim=(1, 2, 3)) + const - model.log_prob(x, y)).abs().max() < 1e-9


def test_a_checkpoint_dict_and_a_negative_actnorm_scale():
    data = reference("classification")
    state = state_of(data)
    # A sign flipped in ActNorm's scale and bias and in the convolution's column leaves the map as it was.
    state["actnorms.2.scale"][0, 1] *= -1
    state["actnorms.2.bias"][0, 1] *= -1
    state["inv_convs.2.weight"][:, 1] *= -1
    model = MagicFlow.from_published(
        {"model_state_dict": state}, config_of(data, "classification"), data["data/custom_mask"]
    ).double()
    with torch.no_grad():
        got = model.log_prob_all(torch.from_numpy(data["data/x"]).double())
    assert relative(got, data["expected/log_likelihood_all_labels"]) < 1e-9


def test_imported_models_survive_save_and_load(tmp_path):
    data = reference("classification")
    model = model_of(data, "classification")
    model.save(tmp_path)
    loaded = MagicFlow.load(tmp_path)
    x = torch.from_numpy(data["data/x"])
    with torch.no_grad():
        assert torch.equal(loaded.log_prob_all(x), model.log_prob_all(x))
        # The float64 factors are in the file too.
        assert (
            relative(loaded.double().log_prob_all(x.double()), data["expected/log_likelihood_all_labels"])
            < 1e-9
        )


@pytest.mark.parametrize(
    ("task", "change", "words"),
    [
        ("classification", lambda s: s.pop("coupling_layers.3.t_fc3.weight"), "coupling_layers.3"),
        ("classification", lambda s: s.pop("inv_convs.4.weight"), "inv_convs.4.weight"),
        ("classification", lambda s: s.update({"inv_convs.7.weight": torch.eye(2)}), "inv_convs.7.weight"),
        ("classification", lambda s: s.update({"optimizer": torch.eye(2)}), "optimizer"),
        (
            "classification",
            lambda s: s.update({"coupling_layers.0.extra.weight": torch.eye(2)}),
            "extra.weight",
        ),
        (
            "classification",
            lambda s: s.update({"actnorms.0.scale": torch.zeros(1, 1, 1, 1)}),
            "actnorms.0.scale",
        ),
        ("classification", lambda s: s.update({"actnorms.0.initialized": torch.tensor(False)}), "actnorms.0"),
        ("classification", lambda s: s.update({"inv_convs.1.weight": torch.eye(3)}), "step 1"),
    ],
)
def test_what_does_not_fit_is_named(task, change, words):
    data = reference(task)
    state = state_of(data)
    change(state)
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        MagicFlow.from_published(state, config_of(data, task), data["data/custom_mask"])


def test_batch_norm_weights_need_a_batch_norm_config():
    data = reference("generation")
    with pytest.raises(ValueError, match="norm='group'"):
        model_of(data, "generation", norm="group")

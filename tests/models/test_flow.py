"""A flow conditioned on labels: both walks, computed once for any number of images."""

import pytest
import torch
from helpers import application_mask, build, images, labels

from fastflow import FlowConfig, MagicFlow
from fastflow.errors import UninitializedModelError
from fastflow.kernels.checks import check_label_index, mark_label_index
from fastflow.models.coupling import draw_seeds

LAYOUTS = {
    "classification": {},
    "generation": {"task": "generation"},
    "label-free steps": {"condition_from_step": 2},
    # Steps of one channel are applied by the coupling before them.
    "one channel": {"squeeze_before": (4, 5), "split_after": ()},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_conditioned_flow_is_the_flow(name):
    model = build(FlowConfig.tiny(3, **LAYOUTS[name]))
    x, y = images(model.config, 4), torch.tensor([2, 0, 2, 1])
    chosen = torch.tensor([2, 0, 1])
    with torch.no_grad():
        z, logdet = model(x, y)
        flow = model.condition(chosen)
        # The index names a label among those that the flow was conditioned on.
        walk = flow.forward(x, torch.tensor([0, 1, 0, 2]))
        blocks = [walk.h, *walk.blocks]
        torch.testing.assert_close(
            torch.cat([b.flatten(1) for b in blocks], dim=1), z, rtol=1e-12, atol=1e-12
        )
        total = sum(term + step.mixing_logdet() for term, step in zip(walk.terms, flow.steps, strict=True))
        torch.testing.assert_close(total, logdet, rtol=1e-12, atol=1e-12)
        back = model.condition(chosen, inverse=True).inverse(blocks, torch.tensor([0, 1, 0, 2]))
        assert (back - x).abs().max() < 1e-10


@pytest.mark.parametrize("cut", [1, 3])
def test_a_walk_may_stop_between_steps(cut):
    model = build(FlowConfig.tiny(3))
    x, y = images(model.config, 3), labels(model.config, 3)
    with torch.no_grad():
        flow = model.condition(torch.arange(3))
        whole = flow.forward(x, y)
        start = flow.forward(x, y, last=cut)
        rest = flow.forward(start.h, y, start.masked, first=cut)
    assert torch.equal(rest.h, whole.h) and len(start.terms) == cut
    for a, b in zip([*start.terms, *rest.terms], whole.terms, strict=True):
        assert torch.equal(a, b)


def test_everything_that_no_image_changes_is_there_before_the_first_image():
    model = build(FlowConfig.tiny(3, condition_from_step=2, squeeze_before=(4, 5), split_after=()))
    flow = model.condition(torch.arange(3))
    for i, (one, step) in enumerate(zip(flow.steps, model.steps, strict=True)):
        assert torch.equal(one.mixing_logdet(), step.mixing_logdet())
        # Steps that ignore the label share one entry.
        assert {len(film.gamma) for params in one.label_params for film in params.films} == {
            3 if i >= 2 else 1
        }
    applied = [one.next_input is not None for one in flow.steps]
    assert applied == [True, True, True, False, False, False]
    assert [one.mixing is None for one in flow.steps] == [False, *applied[:-1]]


def test_a_flow_without_data_conditions_forward_only():
    model = MagicFlow(FlowConfig.tiny(2), application_mask(16, 16)).train()
    flow = model.condition(torch.arange(2))
    assert all(one.mixing is None and one.logdet is None for one in flow.steps)
    flow.forward(images(model.config, 4, dtype=torch.float32), labels(model.config, 4))
    assert model.initialized
    with pytest.raises(UninitializedModelError):
        MagicFlow(FlowConfig.tiny(2), application_mask(16, 16)).condition(torch.arange(2), inverse=True)


@pytest.mark.parametrize("dropout", [0.2, 0.0])
def test_one_draw_gives_the_seeds_of_a_draw_for_each_coupling(dropout):
    model = MagicFlow(FlowConfig.tiny(2, dropout=dropout)).train()
    couplings = [step.coupling for step in model.steps]
    device = torch.device("cpu")
    torch.manual_seed(3)
    one_by_one = [coupling.draw_seeds(5, device) for coupling in couplings]
    torch.manual_seed(3)
    at_once = draw_seeds(couplings, 5, device)
    for first, second in zip(one_by_one, at_once, strict=True):
        for half, same in zip(first, second, strict=True):
            assert (half is None and same is None) if dropout == 0 else torch.equal(half, same)
    model.eval()
    assert draw_seeds(couplings, 5, device) == [(None, None)] * len(couplings)


def test_labels_that_are_known_are_not_looked_at():
    label_index, x = torch.tensor([0, 1, 2]), torch.zeros(3)
    check_label_index(mark_label_index(label_index, 2), 3, 2, x)
    with pytest.raises(ValueError, match="from 0 to 1"):
        check_label_index(label_index.clone(), 3, 2, x)
    label_index.fill_(2)
    with pytest.raises(ValueError, match="from 0 to 1"):
        check_label_index(label_index, 3, 2, x)

"""Steps of training that several tests take, and a mode that finds what waits for a device."""

import traceback

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastflow import FlowConfig, MagicFlow
from fastflow.training.step import TrainingStep
from fastflow.training.trainer import TrainConfig

# Two squeezes and a split in half as many steps as the preset has.
LAYOUT = {
    "masks": ("custom", "checkerboard", "channel"),
    "squeeze_before": (0, 1),
    "split_after": (1,),
    "widths": ((8, 8, 8),) * 3,
}
CLASSES, BATCH = 3, 5
OBJECTIVES = ("likelihood", "pairwise", "hybrid")


def new_model(dtype=torch.float32, **changes):
    """A model whose couplings are no identities, and which has seen no data."""
    torch.manual_seed(0)
    model = MagicFlow(FlowConfig.tiny(CLASSES, **{"dequantize": "uniform", **LAYOUT, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(dtype).train()


def batches(steps, size=BATCH, seed=0):
    drawn = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield (
            torch.randint(256, (size, 1, 16, 16), dtype=torch.uint8, generator=drawn),
            torch.randint(CLASSES, (size,), generator=drawn),
        )


def settings(**changes):
    return TrainConfig(**{"batch_size": BATCH, "learning_rate": 3e-3, "contrast_temperature": 9.0, **changes})


def run_steps(model, config, data, **options):
    torch.manual_seed(7)
    step = TrainingStep(model, config, torch.Generator().manual_seed(3), **options)
    for images, labels in data:
        step(images, labels)
    return step


def assert_same(first, second):
    """Two modules have the same bits."""
    assert not [
        name
        for name, value in first.state_dict().items()
        if not torch.equal(value, second.state_dict()[name])
    ]


class NoWaiting(TorchDispatchMode):
    """Collects the ops whose result the host, or the shape of a result, would need at once."""

    OPS = frozenset(
        (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "unique",
            "_unique2",
            "is_nonzero",
            "equal",
            "bincount",
            "multinomial",
        )
    )

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        if name in self.OPS:
            own = [f for f in traceback.extract_stack() if "/fastflow/" in f.filename]
            self.found.append((name, f"{own[-1].filename}:{own[-1].lineno}" if own else ""))
        return func(*args, **(kwargs or {}))

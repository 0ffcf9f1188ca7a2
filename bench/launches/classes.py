"""The class of a launch: the innermost code of the package, or of torch, that a rule names."""

from __future__ import annotations

import re
from pathlib import Path
from types import CodeType
from typing import NamedTuple

LABEL_TABLES, MATRICES, CHANNEL_MIX = "label tables", "mixing matrices", "channel mix"
NORMS, CBAM, PYRAMID, CONTEXT = "norms", "CBAM", "pyramid", "global fusion and context"
RESIDUAL, STAGES, WEIGHT_NORM = "residual convolutions", "stage convolutions", "weight norm"
FEATURES, HEAD, PRIOR, SEEDS = "head features", "coupling head", "prior", "dropout seeds"
ADDS, OPTIMIZER = "gradient adds", "clip, optimizer, average"
BATCHES, REST = "augmentation", "rest"
CLASSES = (
    LABEL_TABLES, MATRICES, CHANNEL_MIX, NORMS, CBAM, PYRAMID, CONTEXT, RESIDUAL, STAGES, WEIGHT_NORM,
    FEATURES, HEAD, PRIOR, SEEDS, ADDS, BATCHES, OPTIMIZER, REST,
)  # fmt: skip


class Rule(NamedTuple):
    """Code that belongs to a class: a file, and a function or method in it by its qualified name."""

    file: str
    function: str
    name: str


# Rules of models, of torch and of ops that models compose: the innermost frame that one names decides.
RULES = (
    Rule(r"nn/utils/parametrizations\.py", r"_WeightNorm\..*", WEIGHT_NORM),
    Rule(r"models/conditioners/grouped\.py", r"grouped_weight_norm", WEIGHT_NORM),
    Rule(r"models/conditioners/grouped\.py", r".*", LABEL_TABLES),
    Rule(r"models/conditioners/uses\.py", r".*[Tt]wo_?[Uu]ses.*", ADDS),
    Rule(r"kernels/head_features\.py", r".*", FEATURES),
    Rule(r"models/.*", r".*draw_seeds|.*dropout_seeds", SEEDS),
    Rule(r"models/.*", r".*label_(params|tables|embedding).*|.*\.(fold|table)|one_hot_linear", LABEL_TABLES),
    Rule(r"models/conditioners/label_.*", r".*(fold|table|embed|grouped).*", LABEL_TABLES),
    Rule(
        r"models/(layers|step|mixing.*)\.py", r".*\.(mixing|inverse_matri|affine|mixing_logdet).*", MATRICES
    ),
    Rule(r"models/(layers|mixing.*)\.py", r"(InvertibleConv1x1|ActNorm|.*[Mm]ixing).*", MATRICES),
    Rule(r"models/.*", r".*\.(mix|unmix)", CHANNEL_MIX),
    Rule(r"models/.*", r"(BatchNormFiLM|NormFiLM)\.forward", NORMS),
    Rule(r"models/.*", r"CBAM\..*", CBAM),
    Rule(r"models/.*", r"ASPP\..*", PYRAMID),
    Rule(r"models/.*", r"(GlobalFusion|GlobalContext)\..*", CONTEXT),
    Rule(r"models/.*", r"residual_block|ResidualBlock\..*", RESIDUAL),
    Rule(r"models/.*", r"encode_strided|encode_full_resolution", STAGES),
    Rule(r"models/.*", r".*(DenseHead|head).*features.*", FEATURES),
    Rule(r"models/.*", r".*Conditioner\.(encode|transform|forward)", HEAD),
    Rule(r"torch/(optim|nn/utils/clip_grad).*", r".*", OPTIMIZER),
    Rule(r"training/(average|optimi[sz]er|update)\.py", r".*", OPTIMIZER),
    Rule(r"training/.*", r".*(augment|dequantize).*", BATCHES),
    Rule(r"training/augment\.py", r".*", BATCHES),
    Rule(r"training/.*", r".*(_update|clip|optimi[sz]|average|ema|total_norm).*", OPTIMIZER),
    Rule(r"models/reversible\.py", r"_add", ADDS),
    Rule(r"models/reversible\.py", r"ReversibleStep\.backward", REST),
)
# The kernels' own files decide where no model asked for them.
KERNEL_RULES = (
    Rule(r"kernels/.*latent_prior.*", r".*", PRIOR),
    Rule(r"kernels/.*label_(params|tables).*", r".*", LABEL_TABLES),
    Rule(r"kernels/.*(mixing|lu_|matrices).*", r".*", MATRICES),
    Rule(r"kernels/.*(channel_mix|squeeze).*", r".*", CHANNEL_MIX),
    Rule(r"kernels/.*weight_norm.*", r".*", WEIGHT_NORM),
)


def _found(code: CodeType, rules: tuple[Rule, ...]) -> str:
    path = Path(code.co_filename).as_posix()
    for rule in rules:
        if re.search(rf"(^|/){rule.file}$", path) and re.fullmatch(rule.function, code.co_qualname):
            return rule.name
    return ""


_model_classes: dict[CodeType, str] = {}
_kernel_classes: dict[CodeType, str] = {}


def model_class(code: CodeType) -> str:
    """The class that a model's code belongs to; empty where no rule names it."""
    if code not in _model_classes:
        _model_classes[code] = _found(code, RULES)
    return _model_classes[code]


def kernel_class(code: CodeType) -> str:
    """The class that an op's own code belongs to; empty where no rule names it."""
    if code not in _kernel_classes:
        _kernel_classes[code] = _found(code, KERNEL_RULES)
    return _kernel_classes[code]

"""The choice of an epoch by accuracy, by bits/dim, and by both."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastflow.training.selection import RULES, Selection, best_epochs


def records(*rows):
    """Records of rows (balanced accuracy, NLL, bits/dim); the plain accuracy is the balanced one."""
    names = ("val_balanced_accuracy", "val_nll", "val_bits_per_dim")
    return [
        {"epoch": i + 1, "val_accuracy": row[0], **dict(zip(names, row, strict=True))}
        for i, row in enumerate(rows)
    ]


@pytest.mark.parametrize(
    ("rows", "accuracy", "loss", "both"),
    [
        # The most accurate epoch is far from the best likelihood, the third is near it.
        ([(0.9, 0.3, 6.0), (0.5, 0.3, 5.0), (0.8, 0.3, 5.03), (0.7, 0.3, 4.99)], 1, 4, 3),
        # The kept epoch is no longer admitted, so the one that beat it is kept, and the next may beat that.
        ([(0.9, 0.3, 5.0), (0.4, 0.3, 4.9), (0.5, 0.3, 4.9)], 1, 2, 3),
        # Equal accuracies: the lower NLL decides, then the lower bits/dim, then the earlier epoch.
        ([(0.8, 0.4, 5.0), (0.8, 0.3, 5.01), (0.8, 0.5, 4.99)], 3, 3, 2),
        ([(0.8, 0.3, 5.01), (0.8, 0.3, 5.0), (0.8, 0.3, 5.0)], 2, 2, 2),
        # An NLL that is not a number loses, and bits/dim that are none are kept by no rule.
        ([(0.8, math.nan, 5.0), (0.8, 9.0, 5.0)], 1, 1, 2),
        ([(0.9, 0.1, math.nan), (0.2, 0.3, 5.0)], 2, 2, 2),
        # Negative bits/dim have a tolerance too.
        ([(0.9, 0.3, -4.97), (0.8, 0.3, -5.0), (0.95, 0.3, -4.9)], 3, 2, 1),
    ],
)
def test_rules(rows, accuracy, loss, both):
    assert best_epochs(records(*rows)) == {"accuracy": accuracy, "loss": loss, "both": both}


@given(
    st.lists(st.tuples(st.integers(0, 4).map(lambda n: n / 4), st.floats(0, 2), st.floats(4, 5)), max_size=8),
    st.floats(0, 0.2),
)
def test_what_both_keeps_is_admitted_and_no_later_epoch_beats_it(rows, tolerance):
    history, selection = records(*rows), Selection(tolerance)
    for i, record in enumerate(history):
        before = dict(selection.kept)
        found = selection.take(record)
        assert [rule for rule in RULES if selection.kept[rule] != before[rule]] == [
            rule for rule in RULES if rule in found
        ]
        lowest = min(row[2] for row in rows[: i + 1])
        kept = rows[selection.kept["both"] - 1]
        assert kept[2] <= lowest * (1 + tolerance) + 1e-9
        later = rows[selection.kept["both"] : i + 1]
        assert all(row[0] <= kept[0] or row[2] > lowest * (1 + tolerance) - 1e-9 for row in later)
    assert best_epochs(history, tolerance) == selection.kept


def test_one_class_has_bits_per_dim_alone_and_none_has_nothing():
    assert best_epochs([{"epoch": 1.0, "val_bits_per_dim": 5.0}]) == {"accuracy": 0, "loss": 1, "both": 0}
    assert best_epochs([{"epoch": 1.0}]) == dict.fromkeys(RULES, 0)


def test_what_is_forgotten_is_kept_anew():
    selection = Selection()
    for record in records((0.9, 0.3, 5.0)):
        selection.take(record)
    selection.forget("both")
    assert selection.kept["both"] == 0
    worse = {**records((0.5, 0.6, 5.01))[0], "epoch": 2}
    assert selection.take(worse) == ["both"] and selection.kept == {"accuracy": 1, "loss": 1, "both": 2}

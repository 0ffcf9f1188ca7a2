from __future__ import annotations

import dataclasses
import math

import pytest

from fastflow.archive.inputs import Shard
from fastflow.archive.options import ClassifyOptions, RunOptions, parse_prior, pick_workers


def test_keywords_and_options_are_the_same() -> None:
    assert list(ClassifyOptions.__annotations__) == [field.name for field in dataclasses.fields(RunOptions)]


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({}, math.inf),
        ({"max_errors": 3}, 3),
        ({"on_error": "fail"}, 0),
        ({"on_error": "fail", "max_errors": 3}, 0),
    ],
)
def test_how_many_errors_are_allowed(options: dict[str, object], limit: float) -> None:
    assert RunOptions(**options).error_limit == limit  # type: ignore[arg-type]


def test_parts_and_resuming() -> None:
    assert RunOptions().part is None
    assert RunOptions(shard="2/3").part == RunOptions(shard=Shard(2, 3)).part == Shard(2, 3)
    resumes = [RunOptions(**{name: True}).resumes for name in ("resume", "retry_failed", "overwrite")]
    assert resumes == [True, True, False]


def test_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, workers in ((None, 1), (1, 1), (6, 3), (64, 8)):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        assert RunOptions().num_workers == pick_workers(None) == workers
    assert RunOptions(workers=11).num_workers == 11


def test_priors() -> None:
    assert parse_prior(None) is None
    assert parse_prior("0.5, 0.5") == [0.5, 0.5]
    with pytest.raises(ValueError, match="numbers separated by commas, got 'a,b'"):
        parse_prior("a,b")

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")

from tests.export.handmade import write_export


@pytest.fixture(scope="session")
def export_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export made by hand that fits `scans`. Do not write into it."""
    return write_export(tmp_path_factory.mktemp("export"))

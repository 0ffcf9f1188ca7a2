"""The dependencies that `doctor` lists come from the metadata of the package."""

from importlib import metadata

import pytest

from fastflow import diagnosis

REQUIREMENTS = [
    "torch>=2.6",
    "no-such-package>=1",
    'no-such-wheel>=1.7; platform_machine in "x86_64 AMD64"',
    'ray[data]>=2.40; extra == "ray"',
    'no-such-extra>=1; extra == "export"',
    'torch>=2.6; extra == "export"',
    'no-such-tool; extra == "dev"',
]


@pytest.fixture
def requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", lambda name: REQUIREMENTS)
    monkeypatch.setattr(diagnosis, "_device", lambda: {"device": "none"})


@pytest.mark.usefixtures("requirements")
def test_each_absence_has_its_words() -> None:
    assert diagnosis.dependencies() == {
        "torch": "missing",
        "no-such-package": "missing",
        "no-such-wheel": "not installed",
        "ray": "not installed (optional)",
        "no-such-extra": "not installed (optional)",
    }


@pytest.mark.usefixtures("requirements")
def test_facts_name_every_package_once() -> None:
    facts = diagnosis.diagnose()
    assert list(facts)[:5] == ["fastflow", "python", "cpu cores", "torch", "device"]
    assert facts["torch"] == metadata.version("torch")
    assert facts["no-such-package"] == "missing" and facts["no-such-extra"] == "not installed (optional)"
    assert "no-such-tool" not in facts


def test_a_checkout_without_metadata_needs_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert diagnosis.dependencies() == {"torch": "missing"}

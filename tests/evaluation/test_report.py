from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastflow.evaluation.classification import classification_metrics
from fastflow.evaluation.figures import Explanation
from fastflow.evaluation.report import TestSet, write_report

NAMES = ["Aster", "Borea <b>", "Cirrus & co"]
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


def metrics(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    labels = np.arange(30) % 3
    return classification_metrics(
        labels, np.where(rng.random(30) < 0.7, labels, rng.integers(0, 3, 30)), 3, NAMES
    )


def content() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 2, 24, 20), dtype=np.uint8)
    attribution, contrast = rng.normal(size=(2, 24, 20))
    return {
        "tests": [
            TestSet(
                "Unseen subjects",
                metrics(1),
                metrics(2),
                3.25,
                "made from the training heads",
                grain=metrics(5),
            ),
            TestSet("Unseen head", metrics(3), metrics(4), 12345.6),
        ],
        "real": images,
        "generated": images[:, ::-1],
        "explanations": [
            Explanation(images[0, 0], np.array([-5.0, -1.0, -9.0]), 1, 0, attribution, contrast, 0.5, truth=1)
        ],
        "history": [
            {
                "epoch": e,
                "train_bits_per_dim": 5 / e,
                "val_bits_per_dim": 6 / e,
                "unseen_head_bits_per_dim": 9.0,
                "val_accuracy": e / 9,
            }
            for e in range(1, 9)
        ],
        "details": {"seed": 7, "configuration": {"widths": [8, 8]}, "note": "<script>alert(1)</script>"},
    }


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    write_report(path, **content())
    return path


def test_page_needs_nothing_but_itself(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.all("script") + page.all("link") + page.all("iframe") + page.all("a")
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in page.all("img"))
    assert "http" not in re.sub(r'src="data:[^"]*"|http-equiv', "", text)
    assert [p.name for p in report.parent.iterdir()] == ["report.html"]


def test_every_picture_is_there_with_words(report: Path) -> None:
    page = Page(report.read_text(encoding="utf-8"))
    pictures = page.all("img")
    # Two confusion matrices, samples, attribution, curves.
    assert len(pictures) == len(page.all("figcaption")) == 5
    for picture in pictures:
        assert len(str(picture["alt"])) > 20
        with Image.open(io.BytesIO(base64.b64decode(str(picture["src"]).split(",")[1]))) as image:
            assert image.width > 400
            assert np.asarray(image.convert("L")).std() > 5


def test_numbers_stand_beside_their_baseline_and_provenance(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    for test in content()["tests"]:
        for values in filter(None, (test.metrics, test.histogram, test.grain)):
            assert f"{values['balanced_accuracy']:.3f}" in text
            assert f"{values['accuracy']:.3f}" in text
    assert "3.250" in text
    assert "12,346" in text
    sections = re.split(r"<h2>", text)[1:-1]
    assert len(sections) == 5
    assert all("simulated scanners on real anatomy" in section for section in sections)


def test_names_and_details_are_escaped(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert "Borea &lt;b&gt;" in text
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_class_that_does_not_occur_has_no_recall(tmp_path: Path) -> None:
    values = content()
    empty = classification_metrics(np.array([0, 1]), np.array([0, 1]), 3, NAMES)
    write_report(
        tmp_path / "r.html",
        **{**values, "tests": [TestSet("Few", empty, empty, 1.0)], "explanations": [], "history": []},
    )
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert len(page.all("img")) == 2


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    values = content()
    with pytest.raises(ValueError, match="at least one set"):
        write_report(tmp_path / "r.html", **{**values, "tests": []})
    other = classification_metrics(np.array([0]), np.array([0]), 3)
    with pytest.raises(ValueError, match="same class names"):
        write_report(
            tmp_path / "r.html", **{**values, "tests": [values["tests"][0], TestSet("x", other, other, 1.0)]}
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_browser_shows_every_picture_without_a_network(report: Path, tmp_path: Path) -> None:
    assert widths_in_browser(report, tmp_path) == Page(report.read_text(encoding="utf-8")).all(
        "img"
    ).__len__() * [True]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_browser_check_notices_a_broken_picture(report: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(
        report.read_text(encoding="utf-8").replace(
            "data:image/png;base64,iVBOR", "data:image/png;base64,AAAA", 1
        )
    )
    assert widths_in_browser(broken, tmp_path).count(False) == 1


def widths_in_browser(page: Path, folder: Path) -> list[bool]:
    """Whether each picture of a page has a width once it is loaded.

    A script asks in a copy of the page whose policy allows scripts.
    """
    script = (
        "<script>addEventListener('load', () => { document.title = 'widths:' + "
        "[...document.images].map(i => i.complete && i.naturalWidth > 0).join(',') })</script></body>"
    )
    text = page.read_text(encoding="utf-8")
    text = text.replace(
        "style-src 'unsafe-inline'", "style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    ).replace("</body>", script)
    copy = folder / "copy.html"
    copy.write_text(text, encoding="utf-8")
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'profile'}",
    ]
    # Every name resolves to nothing, so whatever is not in the page cannot appear.
    command += [
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--virtual-time-budget=5000",
        "--dump-dom",
        copy.as_uri(),
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r"<title>widths:([a-z,]*)</title>", dom)
    assert found, dom[:500]
    return [value == "true" for value in found[1].split(",")]

"""What several test files share."""

import pytest
from PIL import Image


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Send everything that a run writes into a folder of this test, and return that folder."""
    for name in ("BUILD", "RESULTS", "FIGURES", "CACHE"):
        monkeypatch.setenv(f"WHALE_{name}", str(tmp_path / name.lower()))
    return tmp_path


@pytest.fixture
def animals(tmp_path):
    """Return a folder per individual: two animals with two small photographs each."""
    folder = tmp_path / "animals"
    for place, name in enumerate(["ada", "bo"]):
        (folder / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (12, 8), (80 * place, 60 * number, 40)).save(
                folder / name / f"{name}{number}.png"
            )
    return folder

import os
from pathlib import Path

import numpy as np
import pytest

from whalelib import report
from whalelib.report import recompute

SET = os.environ.get("WHALE_REFERENCE", "")
REFERENCE = Path(SET) / "reference"
KEYS = ["run", "file", "other", "other_file"]
RANKS = [*"12345", "none"]
WORTH = np.array([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 0])


@pytest.fixture(scope="module")
def pairs():
    return {key: table.set_index("rank")[RANKS] for key, table in report.follow_up().groupby(KEYS)}


def test_every_pair_is_whole(pairs):
    assert len(pairs) == 4 * len(recompute.COMPARED) + 8
    for (run, file, other, other_file), table in pairs.items():
        assert table.index.tolist() == RANKS and table.to_numpy().min() >= 0
        assert table.to_numpy().sum() == (3993 if file.startswith("test") else 5328)
        same = run == other and (file, other_file) == ("hard2", "hard1")
        assert same or (file == other_file and (run, other) in recompute.COMPARED)


def test_ranks_give_the_published_scores(pairs):
    runs = report.published_runs().set_index(["run", "file"])
    found = set()
    for (run, file, other, other_file), table in pairs.items():
        for name, counts in (((run, file), table.sum(axis=1)), ((other, other_file), table.sum())):
            shares = counts.to_numpy() / counts.sum()
            found.add(name)
            assert f"{shares @ WORTH:.5f}" == f"{runs.loc[name, 'MAP@5']:.5f}", name
            for k in (1, 3, 5):
                quoted = runs.loc[name, f"Top@{k}"]
                assert np.isnan(quoted) or f"{shares[:k].sum():.5f}" == f"{quoted:.5f}", (name, k)
    assert found == set(runs.index)


@pytest.mark.skipif(not SET, reason="WHALE_REFERENCE is not set: no predictions of the report's authors")
def test_counted_again(pairs):
    again = dict(iter(recompute.follow_up(REFERENCE).groupby(KEYS)))
    assert ("no-cn", "hard1", "2nd-solution", "hard1") in again
    for key, table in again.items():
        assert table.set_index("rank")[RANKS].equals(pairs[key]), key


def test_nothing_to_compare(tmp_path):
    with pytest.raises(FileNotFoundError, match="no two runs"):
        recompute.follow_up(tmp_path)

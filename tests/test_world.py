import hashlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from whalelib import report
from whalelib.data import world
from whalelib.data.world.animal import make_animal
from whalelib.data.world.photograph import CORNERS, LANDMARKS, SPECIALS, take
from whalelib.data.world.population import NEW_WHALE, make_plan, preset
from whalelib.report import chapter2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return world.make_world("tiny", 7, tmp_path_factory.mktemp("worlds") / "tiny-7", workers=1)


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_same_seed_gives_the_same_bytes_whatever_the_workers(tiny, tmp_path):
    assert digest(world.make_world("tiny", 7, tmp_path / "again", workers=2)) == digest(tiny)


def test_other_seeds_give_other_whales(tmp_path, tiny):
    other = world.make_world("tiny", 8, tmp_path / "other", workers=1)
    assert set(pd.read_csv(other / "train.csv").Id) & set(pd.read_csv(tiny / "train.csv").Id) == {NEW_WHALE}


def test_a_finished_world_is_not_drawn_again(tiny, monkeypatch):
    monkeypatch.setattr(world, "_draw_chunk", lambda *a: pytest.fail("drawn again"))
    assert world.make_world("tiny", 7, tiny) == tiny


def test_an_interrupted_world_goes_on(tiny, tmp_path, monkeypatch):
    real, done = world._draw_chunk, []

    def fail_at_second(rows, folder, seed):
        if done:
            raise KeyboardInterrupt
        done.append(len(rows))
        return real(rows, folder, seed)

    monkeypatch.setattr(world, "_draw_chunk", fail_at_second)
    with pytest.raises(KeyboardInterrupt):
        world.make_world("tiny", 7, tmp_path / "w", workers=1)
    assert not (tmp_path / "w").exists()
    drawn = []
    monkeypatch.setattr(world, "_draw_chunk", lambda rows, *a: drawn.extend(rows) or real(rows, *a))
    folder = world.make_world("tiny", 7, tmp_path / "w", workers=1)
    total = len(pd.read_csv(folder / "hidden" / "animals.csv")) - 2  # a duplicate and a leak are copied
    assert len(drawn) == total - done[0]
    assert digest(folder) == digest(tiny)


def test_a_world_of_another_version_is_made_anew(tmp_path, monkeypatch):
    folder = world.make_world("tiny", 7, tmp_path / "w", workers=1)
    monkeypatch.setattr(world, "VERSION", world.VERSION + 1)
    world.make_world("tiny", 7, folder, workers=1)
    assert json.loads((folder / "world.json").read_text())["version"] == world.VERSION


def test_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="tiny, lab, competition"):
        world.make_world("large")


def test_who_asks_while_another_makes_it_waits(tmp_path, monkeypatch):
    made = []

    def slowly(folder, about, workers):
        made.append(folder)
        time.sleep(0.5)
        folder.mkdir()
        (folder / "world.json").write_text(json.dumps(about | {"finished": True}))
        return folder

    monkeypatch.setattr(world, "_make", slowly)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: world.make_world("tiny", 7, tmp_path / "w"), range(2)))
    assert found == [tmp_path / "w"] * 2 and len(made) == 1


def test_layout_is_kaggles_and_the_answers_are_hidden(tiny):
    train, sample = pd.read_csv(tiny / "train.csv"), pd.read_csv(tiny / "sample_submission.csv")
    assert sorted(train.Image) == sorted(p.name for p in (tiny / "train").iterdir())
    assert sorted(sample.Image) == sorted(p.name for p in (tiny / "test").iterdir())
    truth = pd.read_csv(tiny / "truth" / "photographs.csv")
    assert not {"identity", "Id", "animal"} & set(truth.columns)
    solution = pd.read_csv(tiny / "hidden" / "solution.csv")
    assert (solution.Usage == "public").mean() == pytest.approx(0.22, abs=0.03)
    assert (solution.Id == NEW_WHALE).mean() == pytest.approx(0.276, abs=0.03)
    assert set(solution.Id) - {NEW_WHALE} <= set(train.Id)


def test_truth_agrees_with_itself_and_with_the_pixels(tiny):
    truth = pd.read_csv(tiny / "truth" / "photographs.csv")
    place = {"train": tiny / "train", "test": tiny / "test", "earlier": tiny / "earlier" / "train"}
    for row in truth.itertuples():
        image = cv2.imread(str(place[row.split] / row.image))
        mask = cv2.imread(str(tiny / "truth" / row.mask), cv2.IMREAD_GRAYSCALE)
        assert mask.shape == image.shape[:2]
        assert set(np.unique(mask)) <= {0, 255}
        ys, xs = np.nonzero(mask)
        found = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        assert np.abs(found - [row.x0, row.y0, row.x1, row.y1]).max() <= 2.5
        assert row.gray == bool((image == image[..., :1]).all())
        corners = np.array([(getattr(row, f"{c}_x"), getattr(row, f"{c}_y")) for c in CORNERS])
        # Shen's four points span the box up to the top, which the tips' highest point may pass by a little.
        assert np.abs(corners.min(0)[0] - row.x0) <= 3
        assert np.abs(corners.max(0) + 1 - [row.x1, row.y1]).max() <= 3


def test_faults_are_what_they_say(tiny):
    faults = world.faults(tiny)
    assert set(faults.kind) == {"two identities", "unnoticed", "duplicate", "leak"}
    animals = pd.read_csv(tiny / "hidden" / "animals.csv").set_index("Image")
    labels = (
        pd.concat([pd.read_csv(tiny / "train.csv"), pd.read_csv(tiny / "hidden" / "solution.csv")])
        .set_index("Image")
        .Id
    )
    by_label = {label: set(animals.loc[group.index].Animal) for label, group in labels.groupby(labels)}
    for fault in faults.itertuples():
        if fault.kind == "two identities":
            assert by_label[fault.identity] == by_label[fault.other]
        elif fault.kind == "unnoticed":
            assert labels[fault.image] == NEW_WHALE
            assert by_label[fault.other] == {animals.Animal[fault.image]}
        elif fault.kind == "duplicate":
            assert (tiny / "train" / fault.image).read_bytes() == (tiny / "train" / fault.other).read_bytes()
        else:
            leaked = tiny / "earlier" / "train" / fault.image
            assert leaked.read_bytes() == (tiny / "test" / fault.other).read_bytes()
            assert fault.identity == labels[fault.other]
    one_whale_ids = [label for label, whales in by_label.items() if label != NEW_WHALE]
    assert all(len(by_label[label]) == 1 for label in one_whale_ids)


def test_the_competition_has_the_reports_counts():
    table, faults = make_plan(preset("competition"), 1)
    contest = table[table["split"] != "earlier"]
    pairs = {
        "2.1": chapter2.table_2_1(contest["split"]),
        "2.2": chapter2.table_2_2(contest.loc[contest["split"] == "train", "identity"]),
        "2.3": chapter2.table_2_3(contest["split"], contest["width"], contest["height"]),
        "2.4": chapter2.table_2_4(contest["split"], contest["gray"]),
    }
    for number, made in pairs.items():
        printed = report.table(number)
        for column in made.columns:
            wanted = printed[column]
            assert (
                made[column].astype(str).tolist() == wanted.astype(made[column].dtype).astype(str).tolist()
            ), (number, column)
    assert faults.kind.value_counts().to_dict() == {
        "unnoticed": 189,
        "leak": 135,
        "two identities": 89,
        "duplicate": 10,
    }
    assert table.image.is_unique


def test_the_lab_world_is_as_large_as_it_says_and_shows_every_case():
    table, _ = make_plan(preset("lab"), world.DEFAULT_SEED)
    contest = table[table["split"] != "earlier"]
    assert 1000 <= len(contest) <= 1500
    assert contest.loc[contest.identity != NEW_WHALE, "identity"].nunique() == 150
    assert set(contest.special) == set(SPECIALS)
    assert contest.gray.mean() == pytest.approx(1 / 3, abs=0.05)


@pytest.mark.parametrize("special", SPECIALS)
def test_every_kind_of_photograph_has_its_truth(special):
    picture = take(
        make_animal([1, 0, 3]), np.random.default_rng(5), (180, 320), special == "blurry", special, seed=1
    )
    assert picture.image.shape == (180, 320, 3)
    assert picture.image.dtype == np.uint8
    assert picture.mask.shape == (180, 320)
    assert (picture.mask > 0).mean() > 0.005
    assert set(picture.points) >= set(LANDMARKS) | set(CORNERS)
    x0, y0, x1, y1 = picture.box
    assert 0 <= x0 < x1 <= 320
    assert 0 <= y0 < y1 <= 180


def test_an_unknown_kind_of_photograph_is_refused():
    with pytest.raises(ValueError, match="sketch"):
        take(make_animal([1, 0, 3]), np.random.default_rng(5), (100, 200), special="upside down")


def test_left_and_right_differ_as_much_as_two_whales():
    whales = [make_animal([3, 0, k]) for k in range(8)]
    flat = [w.texture.astype(float) * (w.texture[..., 1:] > 0) for w in whales]

    def distance(a, b):
        return np.abs(a - b).mean()

    mirrored = np.mean([distance(f, f[:, ::-1]) for f in flat])
    others = np.mean([distance(flat[i], flat[j]) for i in range(8) for j in range(i)])
    assert mirrored > 0.2 * others
    assert all(distance(f, f[:, ::-1]) > 1 for f in flat)  # the darkest differ by their edges alone


def test_whales_run_from_nearly_black_to_nearly_white():
    darkness = np.array([make_animal([4, 0, k]).darkness for k in range(60)])
    assert darkness.min() < 0.2
    assert darkness.max() > 0.97
    assert 0.15 < (darkness > 0.8).mean() < 0.8


def test_no_picture_leaves_its_folder(tiny):
    assert all(Path(name).name == name for name in pd.read_csv(tiny / "train.csv").Image)


def test_specials_are_the_plan_s(tiny):
    kinds = world.specials(tiny)
    photographs = pd.read_csv(tiny / "truth" / "photographs.csv")
    assert kinds.to_dict() == dict(zip(photographs.image, photographs.special, strict=True))
    assert set(kinds) <= set(SPECIALS)

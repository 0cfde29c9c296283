"""A generated world of flukes in Kaggle's layout, with the truth that no real set has.

`make_world` draws whales, photographs them, labels them as a contest would, and plants the contest's faults.
The same preset and seed give the same bytes on the same machine and libraries.
"""

import json
import os
import shutil
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from whalelib.data.world.animal import make_animal
from whalelib.data.world.photograph import CORNERS, LANDMARKS, take
from whalelib.data.world.population import NEW_WHALE, make_plan, preset
from whalelib.files import locked, replacing
from whalelib.ledger import project_root

VERSION = 2  # of the pictures: raise it with every change of look, so that older worlds are drawn anew
PRESETS = ("tiny", "lab", "competition")
DEFAULT_SEED = 2019
CHUNK = 48


def _draw_chunk(rows, folder, seed):
    """Draw and store the photographs of a chunk of the plan; returns their truth, one dict a row."""
    cv2.setNumThreads(1)
    animal, drawn, truth = None, None, []
    for row in rows:
        if animal != row["animal"]:
            animal, drawn = row["animal"], make_animal([seed, 0, row["animal"]])
        rng = np.random.default_rng([seed, 2, zlib.crc32(row["image"].encode())])
        picture = take(drawn, rng, (row["height"], row["width"]), row["gray"], row["special"], seed)
        pixels = picture.image[..., ::-1]
        if row["gray"] and rng.random() < 0.5:
            pixels = picture.image[..., 0]  # half of the gray files have one channel, as in the competition
        quality = int(rng.integers(72, 96))
        place = folder / "earlier" / "train" if row["split"] == "earlier" else folder / row["split"]
        (place / row["image"]).write_bytes(
            cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        )
        mask = f"{Path(row['image']).stem}.png"
        options = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_BILEVEL, 1]
        (folder / "truth" / "masks" / mask).write_bytes(cv2.imencode(".png", picture.mask, options)[1])
        facts = {"image": row["image"], "split": row["split"], "mask": f"masks/{mask}", "gray": row["gray"]}
        facts |= dict(zip(("x0", "y0", "x1", "y1"), np.round(picture.box, 1), strict=True))
        for name in (*LANDMARKS, *CORNERS):
            x, y = picture.points.get(name, (np.nan, np.nan))
            facts |= {f"{name}_x": round(float(x), 1), f"{name}_y": round(float(y), 1)}
        facts |= {name: round(v, 2) if isinstance(v, float) else v for name, v in picture.pose.items()}
        truth.append(facts)
    return truth


def _work(number, rows, folder, seed):
    """One chunk, remembered in a part file so that an interrupted world goes on where it was."""
    part = folder / "parts" / f"{number:05d}.json"
    if not part.exists():
        truth = _draw_chunk(rows, folder, seed)
        with replacing(part) as partial:
            partial.write_text(json.dumps(truth))
    return len(rows)


def make_world(name="lab", seed=DEFAULT_SEED, folder=None, workers=None):
    """Make a world, or find it made; returns its folder.

    name: one of PRESETS; seed: the world's own; workers: processes, default one a core;
    folder: where to put it, default data/world/NAME-SEED.
    Layout: train.csv, train/, test/, sample_submission.csv (Kaggle's); earlier/ (an earlier contest: train.csv,
    train/); truth/photographs.csv and truth/masks/ (boxes, points, poses, no identities); hidden/ (solution.csv,
    faults.csv, animals.csv). Raises ValueError for an unknown preset.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown world {name!r}: one of {', '.join(PRESETS)}")
    folder = Path(folder or project_root() / "data" / "world" / f"{name}-{seed}")
    about = {"preset": name, "seed": int(seed), "version": VERSION}
    if _finished(folder, about):
        return folder
    with locked(folder.parent):
        return folder if _finished(folder, about) else _make(folder, about, workers)


def _make(folder, about, workers):
    """Draw a world under another name, then put it in its place; returns that."""
    name, seed = about["preset"], about["seed"]
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.exists() and json.loads((partial / "world.json").read_text() or "{}") != about:
        shutil.rmtree(partial)
    for place in ("train", "test", "earlier/train", "truth/masks", "hidden", "parts"):
        (partial / place).mkdir(parents=True, exist_ok=True)
    (partial / "world.json").write_text(json.dumps(about))

    table, faults = make_plan(preset(name), seed)
    drawn = table[table.copy_of == ""].sort_values(["animal", "image"])
    rows = drawn[["image", "split", "animal", "width", "height", "gray", "special"]].to_dict("records")
    chunks = [rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK)]
    workers = workers or os.cpu_count() or 1
    title = f"drawing the world {name}@{seed}"
    with tqdm(total=len(rows), desc=title, unit="photo") as bar:
        if workers == 1 or len(chunks) == 1:
            for number, chunk in enumerate(chunks):
                bar.update(_work(number, chunk, partial, seed))
        else:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                jobs = [
                    pool.submit(_work, number, chunk, partial, seed) for number, chunk in enumerate(chunks)
                ]
                for job in as_completed(jobs):
                    bar.update(job.result())
    _publish(partial, table, faults)
    (partial / "world.json").write_text(
        json.dumps(about | {"finished": True, "photographs": len(table)}, indent=1)
    )
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)
    return folder


def _finished(folder, about):
    """Whether the folder holds this world, whole and of this version."""
    try:
        found = json.loads((folder / "world.json").read_text())
    except (OSError, ValueError):
        return False
    return found.get("finished", False) and all(found.get(key) == value for key, value in about.items())


def _publish(folder, table, faults):
    """Write the contest's files, the truth and what is hidden, once every photograph is drawn."""
    parts = sorted((folder / "parts").glob("*.json"))
    truth = pd.DataFrame([row for part in parts for row in json.loads(part.read_text())]).set_index("image")
    place = {"train": folder / "train", "test": folder / "test", "earlier": folder / "earlier" / "train"}
    copies = []
    by_image = table.set_index("image")
    for row in table[table.copy_of != ""].itertuples():
        source = place[by_image.split[row.copy_of]] / row.copy_of
        shutil.copyfile(source, place[row.split] / row.image)
        copies.append(
            truth.loc[row.copy_of].rename(row.image).replace({by_image.split[row.copy_of]: row.split})
        )
    if copies:
        truth = pd.concat([truth, pd.DataFrame(copies)])
    truth.loc[table.image].rename_axis("image").to_csv(folder / "truth" / "photographs.csv")

    def write(rows, path, columns=("image", "identity"), names=("Image", "Id")):
        rows[list(columns)].set_axis(list(names), axis=1).to_csv(path, index=False)

    train, test, earlier = (table[table["split"] == name] for name in ("train", "test", "earlier"))
    write(train, folder / "train.csv")
    write(earlier, folder / "earlier" / "train.csv")
    common = (
        train.identity[train.identity != NEW_WHALE]
        .value_counts(sort=False)
        .sort_index()
        .sort_values(ascending=False, kind="stable")
        .index[:4]
    )
    write(test.assign(identity=" ".join([NEW_WHALE, *common])), folder / "sample_submission.csv")
    write(test, folder / "hidden" / "solution.csv", ("image", "identity", "usage"), ("Image", "Id", "Usage"))
    write(
        table, folder / "hidden" / "animals.csv", ("image", "split", "animal"), ("Image", "Split", "Animal")
    )
    faults.to_csv(folder / "hidden" / "faults.csv", index=False)
    shutil.rmtree(folder / "parts")


def faults(folder):
    """The faults planted in a world: DataFrame kind, image, identity, other.

    Kinds: "two identities" (identity and other are one whale), "unnoticed" (a known whale, other, labelled new_whale),
    "duplicate" (image is a copy of other), "leak" (an earlier contest's image, copy of the test photograph other).
    """
    return pd.read_csv(Path(folder) / "hidden" / "faults.csv", keep_default_na=False)


def specials(folder):
    """What is unusual about each photograph of a world: a Series of kinds by image, "plain" for most.

    Kinds: SPECIALS, section 2.3's and appendix A's. Raises FileNotFoundError where there is no truth.
    """
    return pd.read_csv(Path(folder) / "truth" / "photographs.csv", index_col="image")["special"]

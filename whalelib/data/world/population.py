"""Who is photographed, how often, under which name, with which faults: the plan of a world, before any pixel."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from whalelib import report
from whalelib.data.layouts import NEW_SHARE, NEW_WHALE
from whalelib.data.world.photograph import SPECIALS

NEW_SHARE_TRAIN = 9664 / 25361  # Table 2.2 and the report's 38.1 %


@dataclass(frozen=True)
class Preset:
    """How large a world is; sizes: training photographs of each known identity, scale: of the pictures' sides."""

    sizes: tuple
    new_train: int
    test: int
    earlier: int
    scale: float = 1.0
    exact: bool = False  # counts of sizes and gray pictures equal the competition's (Tables 2.3 and 2.4)
    twins: int = 0  # pairs of identities that are one whale
    unnoticed: int = 0  # photographs of known whales labelled new_whale
    duplicates: int = 0  # exact copies under another name
    leaks: int = 0  # test photographs that the earlier contest published with their label


def _quantile_sizes(whales, stretch):
    """Class sizes after Table 2.2's distribution; those above one are stretched, or little could be learnt."""
    table = report.class_sizes()
    sizes = np.repeat(table["photographs"].to_numpy(), table["whales"].to_numpy())
    picked = sizes[((np.arange(whales) + 0.5) / whales * len(sizes)).astype(int)]
    return tuple(int(n) if n == 1 else round(n * stretch) for n in picked)


def preset(name):
    """The Preset called tiny, lab or competition. Raises KeyError otherwise."""
    if name == "competition":
        table = report.class_sizes()
        sizes = tuple(np.repeat(table["photographs"], table["whales"]).tolist())
        return Preset(sizes, 9664, 7960, 1774, exact=True, twins=89, unnoticed=189, duplicates=10, leaks=135)
    if name == "lab":
        sizes = _quantile_sizes(150, 1.7)
        return Preset(
            sizes,
            round(sum(sizes) * NEW_SHARE_TRAIN / (1 - NEW_SHARE_TRAIN)),
            272,
            120,
            twins=3,
            unnoticed=12,
            duplicates=4,
            leaks=5,
        )
    if name == "tiny":
        return Preset(
            (1, 1, 2, 2, 3, 3, 4, 5, 6, 8),
            22,
            24,
            10,
            scale=0.25,
            twins=1,
            unnoticed=1,
            duplicates=1,
            leaks=1,
        )
    raise KeyError(name)


def _names(rng, count, digits, taken=()):
    """Distinct hexadecimal names."""
    names = dict.fromkeys(taken)
    start = len(names)
    while len(names) < start + count:
        names[f"{rng.integers(16**digits):0{digits}x}"] = None
    return list(names)[start:]


def _picture_sizes(rng, count, exact):
    """{split: (count[split], 2)} widths and heights after Figure 2.2; exactly Table 2.3's for a competition."""
    like = report.image_sizes_like(int(rng.integers(2**31)))
    shapes = {}
    for split, n in count.items():
        pool = like.loc[
            like["split"] == ("test" if split == "test" else "train"), ["width", "height"]
        ].to_numpy()
        if exact and split != "earlier":
            if n != len(pool):
                raise ValueError(f"{n} {split} pictures planned, but the competition has {len(pool)}")
            shapes[split] = pool
        else:
            shapes[split] = pool[rng.integers(0, len(pool), n)]
    return shapes


def _specials(rng, count):
    """What is unusual about each picture; a small set still shows every case."""
    odds = {
        "caption": 0.03,
        "two flukes": 0.006,
        "front side": 0.008,
        "half": 0.012,
        "poor angle": 0.02,
        "spray": 0.012,
        "blurry": 0.015,
        "sketch": 0.0006,
        "wide": 0.004,
    }
    kinds = rng.choice(SPECIALS, count, p=[1 - sum(odds.values())] + [odds[k] for k in SPECIALS[1:]]).astype(
        object
    )
    if count >= 200:
        kinds[rng.choice(count, len(SPECIALS) - 1, replace=False)] = SPECIALS[1:]
    return kinds


def _who(rng, p, faults):
    """Whose pictures there are: rows of split, animal and identity, and the first identity of each known animal."""
    known = len(p.sizes)
    identity = [f"w_{name}" for name in _names(rng, known, 7)]
    sizes = rng.permutation(p.sizes)
    animal_of = np.arange(known)
    for first, second in rng.choice(known, (p.twins, 2), replace=False):
        animal_of[second] = animal_of[first]
        faults.append(("two identities", "", identity[first], identity[second]))
    home = {animal: identity[k] for k, animal in reversed(list(enumerate(animal_of)))}
    unused = iter([known, known + p.new_train, known + p.new_train + p.test])

    def strangers(count):
        """Unknown whales, some of them photographed more than once."""
        return next(unused) + np.sort(rng.integers(0, max(1, round(count * 0.8)), count))

    def rows(split, ids, new):
        named = [(split, animal_of[k], identity[k]) for k in ids]
        return named + [(split, animal, NEW_WHALE) for animal in new]

    everyone = np.repeat(np.arange(known), sizes)
    unnoticed = animal_of[rng.choice(everyone, p.unnoticed)]
    train = rows("train", everyone, [*unnoticed, *strangers(p.new_train - p.unnoticed)])
    new_test = round(p.test * NEW_SHARE)
    shown = rng.choice(known, p.test - new_test, p=(sizes + 1.0) / (sizes + 1.0).sum())
    test = rows("test", shown, strangers(new_test))
    seen = rng.choice(everyone, round(p.earlier * 0.7))
    earlier = rows("earlier", seen, strangers(p.earlier - len(seen)))
    return pd.DataFrame(train + test + earlier, columns=["split", "animal", "identity"]), home


def _look(rng, p, table):
    """Names, sizes, colour, special cases and the leaderboard's halves: the columns that a picture's look needs."""
    shapes = _picture_sizes(rng, table["split"].value_counts().to_dict(), p.exact)
    for split, digits, scale in (("train", 9, p.scale), ("test", 9, p.scale), ("earlier", 8, 0.6 * p.scale)):
        here = (table["split"] == split).to_numpy()
        count = int(here.sum())
        table.loc[here, "image"] = [f"{name}.jpg" for name in _names(rng, count, digits)]
        table.loc[here, ["width", "height"]] = np.maximum(shapes[split] * scale, 12).astype(int)
        share = report.facts().loc["share of gray photographs", "test" if split == "test" else "train"]
        table.loc[here, "gray"] = rng.permutation(np.arange(count) < round(count * share))
        table.loc[here, "special"] = _specials(rng, count)
    table = table.astype({"width": int, "height": int, "gray": bool, "animal": int})
    table.loc[(table["special"] == "wide") & (table["width"] < 2.6 * table["height"]), "special"] = "plain"
    if not p.exact and (table["special"] != "wide").all():
        row = table.index[(table["split"] == "train") & (table["special"] == "plain")][0]
        shape = [round(side * p.scale) for side in (2528, 382)]  # Figure 2.7's
        table.loc[row, ["special", "width", "height"]] = ["wide", *shape]
    test = table.index[table["split"] == "test"]
    public = rng.permutation(len(test)) < round(0.22 * len(test))
    table["usage"] = ""
    table.loc[test, "usage"] = np.where(public, "public", "private")
    return table.assign(copy_of="")


def _copy(table, target, source, kind, faults):
    """Make one picture a copy of another, in place."""
    columns = ["width", "height", "gray", "special", "animal"]
    table.loc[target, columns] = table.loc[source, columns].to_list()
    table.loc[target, "copy_of"] = table.loc[source, "image"]
    faults.append((kind, table.image[target], table.identity[target], table.image[source]))


def _plant_copies(rng, p, table, faults):
    """Exact duplicates within the training set, and test pictures that the earlier contest had published."""
    plain, train = table["special"] == "plain", table["split"] == "train"
    named = plain & (table["identity"] != NEW_WHALE)
    # A copy takes its source's size and colour; a spare picture takes the target's, so that the totals stay.
    usual = train & plain & ~table["gray"]
    usual &= (table[["width", "height"]] == table.loc[usual, ["width", "height"]].mode().iloc[0]).all(axis=1)
    candidates = table[train & named]
    several = candidates.groupby("identity")["image"].transform("size") > 1
    sources = candidates[usual[candidates.index] & several].drop_duplicates("identity")
    spare = iter(rng.permutation(table.index[usual & (table["identity"] == NEW_WHALE)]))
    for source in sources.index[: p.duplicates]:
        same = candidates.index[candidates["identity"] == table.identity[source]]
        target = same[same != source][0]
        look = ["width", "height", "gray", "special"]
        table.loc[next(spare), look] = table.loc[target, look].to_list()
        _copy(table, target, source, "duplicate", faults)
    leaked = rng.permutation(table.index[named & (table["split"] == "test")])[: p.leaks]
    early = rng.permutation(table.index[named & (table["split"] == "earlier")])[: p.leaks]
    for target, source in zip(early, leaked, strict=True):
        table.loc[target, "identity"] = table.loc[source, "identity"]
        _copy(table, target, source, "leak", faults)


def make_plan(p, seed):
    """The plan of a world, by Preset and seed.

    Returns two DataFrames. photographs, a row a picture: image, split (train, test, earlier), animal (int, the true
    whale), identity (the label its contest gives it), width, height, gray, special, usage (public or private for
    test), copy_of (the image that this one repeats, or ""). faults: kind, image, identity, other.
    """
    rng = np.random.default_rng([seed, 1])
    faults = []
    table, home = _who(rng, p, faults)
    table = _look(rng, p, table)
    _plant_copies(rng, p, table, faults)
    unnoticed = table[
        (table.identity == NEW_WHALE) & table.animal.isin(home.keys()) & (table["split"] == "train")
    ]
    faults += [("unnoticed", row.image, NEW_WHALE, home[row.animal]) for row in unnoticed.itertuples()]
    table = table.sort_values(["split", "image"]).reset_index(drop=True)
    return table, pd.DataFrame(faults, columns=["kind", "image", "identity", "other"])

"""The report's numbers derived again from its authors' own files.

Every function takes `reference`, the folder with the authors' counts (`data_analysis/`), labels
(`competition/`), predictions (`predictions/`, `curation/`), submissions (`submissions/`) and training logs
(`logs_1st/`, `logs_2nd/`). The files are not part of this project; the numbers below are.
"""

import functools
import gzip
import re
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd

from whalelib import metrics, postprocess
from whalelib.contest import read_submission
from whalelib.data.catalog import Catalog, problem_table
from whalelib.report import chapter2, chapter3, chapter4, chapter5

SPLITS = chapter2.SPLITS
COMMON = 5
WIDTH_EDGES = [77, *range(100, 1051, 50), 1051, *range(1100, 2001, 100), *range(2500, 5501, 500), 5960]
HEIGHT_EDGES = [30, *range(50, 1201, 50), 1576]


def identities(reference: Path) -> pd.Series:
    """Labels of the 25,361 training photographs, `new_whale` among them."""
    return pd.read_csv(Path(reference) / "competition" / "train.csv")["Id"]


def bad_photographs(reference: Path) -> pd.DataFrame:
    """`whalelib.report.bad_photographs` with each identity as the training labels have it."""
    from whalelib import report  # noqa: PLC0415

    labels = pd.read_csv(Path(reference) / "competition" / "train.csv", index_col="Image")["Id"]
    shown = report.bad_photographs()
    return shown.assign(identity=shown["image"].map(labels))


def image_size_counts(reference: Path) -> pd.DataFrame:
    """Columns split, width, height, photographs: every size of the 33,321 photographs."""
    folder = Path(reference) / "data_analysis" / "image-sizes"
    sizes = pd.concat([pd.read_csv(folder / f"{split}.csv").assign(split=split) for split in SPLITS])
    columns = {"Width": "width", "Height": "height", "Frequency": "photographs"}
    return sizes.rename(columns=columns)[["split", *columns.values()]].reset_index(drop=True)


def contrasts(reference: Path) -> pd.DataFrame:
    """Columns split, contrast: eq. 2.1 of each of the 33,321 photographs, as the authors computed it."""
    folder = Path(reference) / "data_analysis"
    parts = [pd.read_csv(folder / f"contrast.{split}.csv").assign(split=split) for split in SPLITS]
    return pd.concat(parts, ignore_index=True).rename(columns={"Contrast": "contrast"})[["split", "contrast"]]


def colours(reference: Path) -> pd.DataFrame:
    """Columns split, gray: the authors' count of coloured photographs, one row a photograph.

    Their script calls a photograph coloured if some pixel has r != g and g != b. Only these counts are left,
    so the text's own rule (gray if all channels are equal) cannot be checked without the photographs.
    """
    counts = pd.read_csv(Path(reference) / "data_analysis" / "color.csv")
    rows = counts.loc[counts.index.repeat(counts["Frequency"])]
    return pd.DataFrame({"split": rows["Dataset"].to_numpy(), "gray": ~rows["Colored"].to_numpy(dtype=bool)})


def table_2_1(reference: Path) -> pd.DataFrame:
    """Table 2.1 from the training labels and the sample submission."""
    test = read_submission(Path(reference) / "competition" / "third_place" / "sample_submission.csv")
    return chapter2.table_2_1(["train"] * len(identities(reference)) + ["test"] * len(test))


def table_2_2(reference: Path) -> pd.DataFrame:
    """Table 2.2 from the training labels; like the report, it counts `new_whale` as one id."""
    return chapter2.table_2_2(identities(reference))


def table_2_3(reference: Path) -> pd.DataFrame:
    """Table 2.3 from the authors' list of sizes."""
    return chapter2.table_2_3(*_photographs(image_size_counts(reference)))


def table_2_4(reference: Path) -> pd.DataFrame:
    """Table 2.4 from the authors' counts, by their script's rule (see `colours`)."""
    rows = colours(reference)
    return chapter2.table_2_4(rows["split"], rows["gray"])


def class_sizes(reference: Path) -> pd.DataFrame:
    """Columns photographs (1, 2, ... 73), whales: how many whales have so many; `new_whale` is left out."""
    labels = identities(reference)
    sizes = chapter2.figure_2_1(labels[labels != metrics.NEW_WHALE]).set_index("photographs")["ids"]
    whales = sizes.reindex(range(1, sizes.index.max() + 1), fill_value=0)
    return whales.rename("whales").rename_axis("photographs").reset_index()


def image_sizes(reference: Path) -> pd.DataFrame:
    """Columns width, height, train, test: the sizes that at least five photographs have, commonest first."""
    sizes = _sizes_by_split(reference)
    common = sizes[sizes.sum(axis=1) >= COMMON].reset_index()
    order = (-common["train"] - common["test"]).argsort(kind="stable")
    return common.iloc[order].reset_index(drop=True)


def image_sizes_rest(reference: Path) -> pd.DataFrame:
    """Columns width_from, width_to, height_from, height_to (end excluded), train, test: all other sizes.

    The width of 1050 pixels has a step of its own, since most photographs have it.
    """
    sizes = _sizes_by_split(reference)
    rare = sizes[sizes.sum(axis=1) < COMMON].reset_index()
    steps = {}
    for side, edges in (("width", np.array(WIDTH_EDGES)), ("height", np.array(HEIGHT_EDGES))):
        place = np.searchsorted(edges, rare[side], side="right")
        steps |= {f"{side}_from": edges[place - 1], f"{side}_to": edges[place]}
    return (
        rare[list(SPLITS)]
        .groupby([pd.Series(step, name=name) for name, step in steps.items()])
        .sum()
        .reset_index()
    )


def diagonals(reference: Path) -> pd.DataFrame:
    """Columns ratio, sizes, photographs: the six ratios, width / height, that most different sizes have.

    Sizes 1050 pixels wide are left out: those are the vertical line of Figure 2.2, these its diagonals.
    """
    sizes = _sizes_by_split(reference).sum(axis=1).rename("photographs").reset_index().query("width != 1050")
    ratio = (sizes["width"] / sizes["height"]).round(2).rename("ratio")
    counts = sizes.groupby(ratio)["photographs"].agg(sizes="size", photographs="sum")
    return counts.nlargest(6, "sizes").reset_index()


def contrast_histogram(reference: Path) -> pd.DataFrame:
    """Figure 2.3: columns split, low, high, photographs in ten equal steps a split."""
    values = contrasts(reference)
    return chapter2.figure_2_3(values["split"], values["contrast"]).round({"low": 6, "high": 6})


def facts(reference: Path) -> pd.DataFrame:
    """Columns fact, train, test, all: what chapter 2 says in numbers. Shares lie between 0 and 1."""
    labels, sizes, values, gray = (
        read(reference) for read in (identities, image_size_counts, contrasts, colours)
    )
    whales = labels[labels != metrics.NEW_WHALE].value_counts()
    rows = [
        ("photographs", *_by_split(sizes, lambda part: part["photographs"].sum())),
        ("whales", len(whales), None, None),
        ("photographs of new_whale", (labels == metrics.NEW_WHALE).sum(), None, None),
        ("photographs of whales", whales.sum(), None, None),
        ("photographs of the commonest whale", whales.max(), None, None),
        ("share of new_whale", (labels == metrics.NEW_WHALE).mean(), None, None),
        ("share of whales with one photograph", (whales == 1).mean(), None, None),
        ("share of whales with fewer than six photographs", (whales < 6).mean(), None, None),
        ("share of 1050 x 700 pixels", *_share(sizes, "width == 1050 and height == 700")),
        ("share of widths 970 to 1150 pixels", *_share(sizes, "970 <= width <= 1150")),
        ("share of width 1050 pixels", *_share(sizes, "width == 1050")),
        ("share of heights 200 to 900 pixels", *_share(sizes, "200 <= height <= 900")),
    ]
    for side in ("width", "height"):
        rows.append((f"least {side}", *_by_split(sizes, lambda part, side=side: part[side].min())))
        rows.append((f"greatest {side}", *_by_split(sizes, lambda part, side=side: part[side].max())))
    rows += [
        ("sizes", *_by_split(sizes, lambda part: len(part[["width", "height"]].drop_duplicates()))),
        ("gray photographs", *_by_split(gray, lambda part: part["gray"].sum())),
        ("share of gray photographs", *_by_split(gray, lambda part: part["gray"].mean())),
    ]
    for name in ("mean", "median", "std", "min", "max"):
        statistic = getattr(np, name)
        rows.append(
            (f"{name} contrast", *_by_split(values, lambda part, f=statistic: f(part["contrast"].to_numpy())))
        )
    frame = pd.DataFrame(rows, columns=["fact", *SPLITS, "all"])
    return frame.astype({"train": float, "test": float, "all": float}).round(6)


def first_place_logs(reference: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read all training logs of the first solution, as `chapter3.read_log` reads one: starts and rows.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a line that cannot be read.
    """
    paths = sorted((Path(reference) / "logs_1st").glob("train.*.log.gz"))
    if not paths:
        raise FileNotFoundError(f"{Path(reference) / 'logs_1st'}: no train.NAME.log.gz")
    read = []
    for path in paths:
        text = gzip.decompress(path.read_bytes()).decode()
        read.append(chapter3.read_log(text, path.name.removeprefix("train.").removesuffix(".log.gz")))
    starts, rows = (pd.concat(parts, ignore_index=True) for parts in zip(*read, strict=True))
    return starts, rows


def table_3_2(reference: Path) -> pd.DataFrame:
    """Table 3.2 from the training logs."""
    return chapter3.table_3_2(first_place_logs(reference)[1])


def first_place_starts(reference: Path) -> pd.DataFrame:
    """Every start of the training program, in the order of time: `starts` of `chapter3.read_log`."""
    starts = first_place_logs(reference)[0].sort_values("started", ignore_index=True)
    return starts.drop(columns="line")


def first_place_checkpoints(reference: Path) -> pd.DataFrame:
    """`chapter3.checkpoints` of the training logs."""
    return chapter3.checkpoints(first_place_logs(reference)[1])


def first_place_curves(reference: Path) -> pd.DataFrame:
    """`chapter3.curves` of the training logs."""
    return chapter3.curves(first_place_logs(reference)[1])


def extra_photographs(reference: Path) -> pd.DataFrame:
    """The photographs that the first solution's splits 2 to 5 add to the contest's: Image, Id, splits (how many)."""
    folder = Path(reference) / "competition"
    contest = pd.read_csv(folder / "train.csv")["Image"]
    splits = pd.concat([pd.read_csv(folder / f"train_split_{n}.csv").assign(split=n) for n in range(1, 6)])
    extra = splits[~splits["Image"].isin(contest)]
    return extra.groupby(["Image", "Id"]).size().rename("splits").reset_index()


def playground_labels(reference: Path) -> pd.DataFrame:
    """The playground contest's own labels (Image, Id), from `real/playground2018.zip` beside the reference."""
    with zipfile.ZipFile(Path(reference).parent / "real" / "playground2018.zip") as archive:
        parts = [pd.read_csv(archive.open(name)) for name in ("train.csv", "test_labels.csv")]
    return pd.concat(parts, ignore_index=True)[["Image", "Id"]]


def chapter3_facts(reference: Path) -> pd.DataFrame:
    """The numbers of `whalelib.report.chapter3_facts`: fact, value."""
    extra, folder = extra_photographs(reference), Path(reference) / "submissions"
    carried = chapter3.carried_labels(extra[["Image", "Id"]], playground_labels(reference))
    several = carried[carried["extra"] > 1]
    rows = [
        ("extra photographs", len(extra)),
        ("extra photographs of new_whale", (extra["Id"] == metrics.NEW_WHALE).sum()),
        ("whales of the extra photographs", extra.loc[extra["Id"] != metrics.NEW_WHALE, "Id"].nunique()),
        ("splits that have the extra photographs", extra["splits"].max()),
        ("extra photographs with a label of the playground", carried["extra"].sum()),
        ("playground whales with extra photographs", len(carried)),
        ("of these, whales with several", len(several)),
        ("extra photographs of those", several["extra"].sum()),
        ("playground whales with contradicting labels", (carried["labels"] > 1).sum()),
    ]
    submissions = {
        "First": "first/test.2.1.1",
        "Second": "first/test.4.4.2",
        "second solution": "second/2nd_ensemble",
        "third solution": "third/submission",
    }
    for name, file in submissions.items():
        first = read_submission(folder / f"{file}.csv")["Id"].str.split().str[0]
        rows.append((f"share of new_whale first, {name}", (first == metrics.NEW_WHALE).mean()))
    return pd.DataFrame(rows, columns=["fact", "value"]).astype({"value": float}).round(6)


@functools.lru_cache(maxsize=1)
def second_place_logs(reference: Path) -> chapter4.Logs:
    """Read all training logs of the second solution, as `chapter4.read_log` reads one. They are read once.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a line that cannot be read.
    """
    paths = sorted((Path(reference) / "logs_2nd").glob("*.log.gz"))
    if not paths:
        raise FileNotFoundError(f"{Path(reference) / 'logs_2nd'}: no NAME.log.gz")
    return chapter4.join(
        [
            chapter4.read_log(gzip.decompress(path.read_bytes()).decode(), path.name.removesuffix(".log.gz"))
            for path in paths
        ]
    )


def table_4_3(reference: Path) -> pd.DataFrame:
    """Table 4.3 from the training logs; one cell is in none of them."""
    return chapter4.table_4_3(second_place_logs(reference))


def second_place_checkpoints(reference: Path) -> pd.DataFrame:
    """`chapter4.checkpoints` of the training logs."""
    return chapter4.checkpoints(second_place_logs(reference))


def second_place_schedule(reference: Path) -> pd.DataFrame:
    """`chapter4.schedule` of the training logs."""
    return chapter4.schedule(second_place_logs(reference).rows)


def second_place_curves(reference: Path) -> pd.DataFrame:
    """`chapter4.curves` of the training logs."""
    return chapter4.curves(second_place_logs(reference).rows)


def second_place_guesses(reference: Path, submission: str) -> tuple[np.ndarray, np.ndarray]:
    """The photographs and the (7960, 5) guesses of a submission with the second solution, such as "resnet101"."""
    name = "2nd_ensemble" if submission == "ensemble" else f"2nd.{submission}"
    return metrics.parse_predictions(
        read_submission(Path(reference) / "submissions" / "second" / f"{name}.csv")
    )


def second_place_submissions(reference: Path) -> pd.DataFrame:
    """The columns of `whalelib.report.second_place_submissions`."""
    backbones = list(dict.fromkeys(chapter4.MODELS.str.split(".").str[0]))
    images, ensemble = second_place_guesses(reference, "ensemble")
    rows = []
    for submission in [*chapter4.MODELS, *backbones, "ensemble"]:
        named, guesses = second_place_guesses(reference, submission)
        if not np.array_equal(named, images):
            raise ValueError(f"{submission}: other photographs, or in another order, than the ensemble's")
        first = guesses[:, 0]
        new = (first == metrics.NEW_WHALE).mean()
        rows.append(
            [submission, new, len(set(first) - {metrics.NEW_WHALE}), (first == ensemble[:, 0]).mean()]
        )
    return pd.DataFrame(rows, columns=["submission", "new_first", "whales", "agreement"]).round(6)


def second_place_pseudo_labels(reference: Path) -> pd.DataFrame:
    """The second solution's pseudo labels of test photographs: Image, Id."""
    folder = Path(reference) / "competition" / "second_place_lists"
    labels = pd.read_csv(folder / "label_list.txt", sep=" ", names=["Id", "number"])
    found = pd.read_csv(folder / "pseudo_list.txt", sep=" ", names=["Image", "number"])
    return found.merge(labels, on="number", how="left")[["Image", "Id"]]


def chapter4_facts(reference: Path) -> pd.DataFrame:
    """The numbers of `whalelib.report.chapter4_facts`: fact, value."""
    folder = Path(reference) / "competition"
    pseudo, photographs = second_place_pseudo_labels(reference), identities(reference).value_counts()
    leaks = pd.read_csv(folder / "third_place" / "leaks.csv").merge(
        pseudo, on="Image", suffixes=("", "_pseudo")
    )
    validation = pd.read_csv(folder / "second_place_lists" / "val0.txt", sep=" ", names=["Image", "number"])
    boxes = [
        pd.read_csv(folder / f"second_place_boxes_{name}.csv", index_col="Image")
        for name in ("se50", "se101")
    ]
    boxes.append(pd.read_csv(folder / "first_place_boxes.csv", index_col="Image").loc[boxes[0].index])
    sides = ["x0", "y0", "x1", "y1"]
    se50, se101, first = (part.loc[boxes[0].index, sides].to_numpy(dtype=float) for part in boxes)
    mean = np.floor((se50 + se101) / 2)
    whole = np.array([(box[:, 2:] > box[:, :2]).all(axis=1) for box in (se50, se101, mean, first)]).all(
        axis=0
    )
    both, others = metrics.box_iou(se50[whole], se101[whole]), metrics.box_iou(mean[whole], first[whole])
    rows = [
        ("pseudo labels", len(pseudo)),
        ("whales with pseudo labels", pseudo["Id"].nunique()),
        ("pseudo labels of new_whale", (pseudo["Id"] == metrics.NEW_WHALE).sum()),
        ("pseudo labels of whales with one photograph", (pseudo["Id"].map(photographs) == 1).sum()),
        ("published leaks with a pseudo label", len(leaks)),
        ("of these, with the leaked label", (leaks["Id"] == leaks["Id_pseudo"]).sum()),
        ("validation rows", len(validation)),
        ("validation rows of new_whale", (validation["number"] == -1).sum()),
        ("validation photographs", validation["Image"].nunique()),
        ("photographs with boxes", len(mean)),
        ("empty boxes", (~whole).sum()),
        ("mean overlap of the two networks' boxes", both.mean()),
        ("share of boxes that the networks place less than half alike", (both < 0.5).mean()),
        ("mean overlap with the first solution's boxes", others.mean()),
    ]
    rows += [(f"agreement of the vote by {name}", share) for name, share in _votes(reference).items()]
    return pd.DataFrame(rows, columns=["fact", "value"]).astype({"value": float}).round(6)


def _votes(reference: Path) -> dict[str, float]:
    """Share of the test photographs of which the ten models' rank vote and the ensemble name the same whale first."""
    from whalelib import report  # noqa: PLC0415
    from whalelib.identify import rank_vote  # noqa: PLC0415

    ensemble = second_place_guesses(reference, "ensemble")[1][:, 0]
    singles = [second_place_guesses(reference, log)[1] for log in chapter4.MODELS]
    weights = report.table("4.2")["Weight"]
    points = {"1 / rank": 1 / np.arange(1, 6), "5 to 1": range(5, 0, -1), "first guesses alone": [1]}
    return {
        name: float((rank_vote(singles, weights, worth)[:, 0] == ensemble).mean())
        for name, worth in points.items()
    }


def third_place_labels(reference: Path, version: str = "train") -> pd.Series:
    """The third solution's labels of training photographs, indexed by their names; "train.v2" has its groups."""
    return pd.read_csv(_third_place(reference) / f"{version}.csv", index_col="Image")["Id"]


def third_place_catalog(reference: Path) -> Catalog:
    """The third solution's training photographs as a catalog, of which there are no files."""
    labels = third_place_labels(reference)
    columns = {
        "image": labels.index,
        "identity": labels.to_numpy(),
        "path": "/" + labels.index,
        "split": "train",
    }
    return Catalog("third solution", Path("/"), pd.DataFrame(columns).astype("str"), problem_table([]))


def third_place_guesses(reference: Path, processed: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The photographs and the guesses of the third solution's submission: (7960, 5), or (7960, 6) processed."""
    name = "submission.processed" if processed else "submission"
    return metrics.parse_predictions(
        read_submission(Path(reference) / "submissions" / "third" / f"{name}.csv")
    )


def third_place_groups(reference: Path) -> dict[str, tuple[str, ...]]:
    """The third solution's groups of ids that are one whale."""
    return postprocess.read_groups(
        _third_place(reference) / "duplicate_ids.csv", set(third_place_labels(reference))
    )


def third_place_leaks(reference: Path) -> dict[str, str]:
    """The published answers of 135 test photographs."""
    return postprocess.read_ids(
        _third_place(reference) / "leaks.csv", third_place_guesses(reference)[0], identities(reference)
    )


def third_place_processed(reference: Path) -> postprocess.Processed:
    """The third solution's submission after `postprocess.post_process`.

    The sizes of the photographs are not at hand: they are made so that the rule of sizes does what is left to explain.
    """
    images, guesses = third_place_guesses(reference)
    groups, leaks = third_place_groups(reference), third_place_leaks(reference)
    labels = third_place_labels(reference)
    swaps = chapter5.size_swaps(images, guesses, third_place_guesses(reference, True)[1], groups, leaks)
    sizes = chapter5.made_sizes(images, swaps, groups, labels)
    return postprocess.post_process(images, guesses, groups, leaks, sizes, labels)


def chapter5_facts(reference: Path) -> pd.DataFrame:
    """The numbers of `whalelib.report.chapter5_facts`: fact, value."""
    from whalelib import report  # noqa: PLC0415
    from whalelib.identify import pair_split  # noqa: PLC0415

    labels, grouped = third_place_labels(reference), third_place_labels(reference, "train.v2")
    groups, leaks = third_place_groups(reference), third_place_leaks(reference)
    kinds = postprocess.compare_labels(labels, grouped, groups).set_index(["from", "to"])
    twins = labels[labels.isin([name for ids in groups.values() for name in ids])]
    training, validation = (part.table["identity"] for part in pair_split(third_place_catalog(reference)))
    images, raw = third_place_guesses(reference)
    submitted, processed = third_place_guesses(reference, True)[1], third_place_processed(reference)
    steps = processed.changes["step"].value_counts()
    leaked = pd.Series(images).isin(leaks).to_numpy()
    answers = np.array([leaks[image] for image in images[leaked]], dtype=object)
    scores = report.table("5.3").set_index("Model")
    gap = scores.loc["Park's"] - scores.loc["Ours"]
    rows = [
        ("labels", len(labels)),
        ("photographs that the labels lack", len(identities(reference)) - len(labels)),
        ("photographs of whales, which guesses are compared with", (labels != metrics.NEW_WHALE).sum()),
        ("groups of ids", len(groups)),
        ("ids in groups", sum(map(len, groups.values()))),
        ("labels changed by grouping", kinds["photographs"].sum()),
        ("of these, of whales, to groups", kinds.loc[("whale", "group"), "photographs"]),
        ("ids put into groups", kinds.loc[("whale", "group"), "labels_before"]),
        ("groups used", kinds.loc[("whale", "group"), "labels_after"]),
        ("photographs of groups not used", (twins == grouped[twins.index]).sum()),
        ("of these, of new_whale, to new ids", kinds.loc[(metrics.NEW_WHALE, "new id"), "photographs"]),
        ("new ids", kinds.loc[(metrics.NEW_WHALE, "new id"), "labels_after"]),
        ("of these, of new_whale, to whales", kinds.loc[(metrics.NEW_WHALE, "whale"), "photographs"]),
        ("of these, of new_whale, to groups", kinds.loc[(metrics.NEW_WHALE, "group"), "photographs"]),
        ("ids after grouping", grouped[grouped != metrics.NEW_WHALE].nunique()),
        ("photographs of new_whale after grouping", (grouped == metrics.NEW_WHALE).sum()),
        ("training photographs", len(training)),
        ("whales trained on", training.nunique()),
        ("validation photographs", len(validation)),
        ("validation photographs of new_whale", (validation == metrics.NEW_WHALE).sum()),
        ("rows with an id of a group first", np.isin(raw[:, 0], twins.unique()).sum()),
        ("rows changed by duplicates", steps["duplicates"]),
        ("rows changed by sizes", steps["sizes"]),
        ("rows changed by leaks", steps["leaks"]),
        ("rows changed by all steps", postprocess.changed(raw, submitted).sum()),
        ("rows changed otherwise", postprocess.changed(processed.guesses, submitted).sum()),
        ("rows of six guesses", (submitted[:, 5:] != None).any(axis=1).sum()),  # noqa: E711
        ("share of new_whale first, before", (raw[:, 0] == metrics.NEW_WHALE).mean()),
        ("share of new_whale first, after", (submitted[:, 0] == metrics.NEW_WHALE).mean()),
        ("published leaks", len(leaks)),
        ("leaks named first before", (raw[leaked, 0] == answers).sum()),
        ("leaks named before", (raw[leaked] == answers[:, None]).any(axis=1).sum()),
        ("MAP@5 of the leaks before", metrics.map_at_k(raw[leaked], answers)),
        ("MAP@5 of the leaks after", metrics.map_at_k(submitted[leaked], answers)),
        ("gap to Park's public score", gap["Public"]),
        ("gap to Park's private score", gap["Private"]),
    ]
    return pd.DataFrame(rows, columns=["fact", "value"]).astype({"value": float}).round(6)


def _third_place(reference: Path) -> Path:
    return Path(reference) / "competition" / "third_place"


def find_predictions(reference: Path) -> list[Path]:
    """Files of real predictions under `predictions/`, in any folder, without their endings.

    A run is a folder with `testN.csv` or `hardN.csv` (Image,Id) and the published score in a file of the same
    name and the ending `.md`; a file that lacks the other is listed too, and `score_predictions` refuses it.
    """
    folder = Path(reference) / "predictions"
    names = {path.with_suffix("") for ending in ("csv", "md") for path in folder.rglob(f"*.{ending}")}
    return sorted(name for name in names if re.fullmatch(r"(test|hard)\d+", name.name))


def read_predictions(reference: Path, name: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Read one prediction file and the right labels of its photographs.

    The digit in the name says which training list the model saw: `hardN` is the hard set for a model trained
    on test#N's list. Whales that this list does not show are relabelled `new_whale`.

    Returns:
        The N photographs' names, (N, 5) guesses, (N,) labels, and (N,) labels as the model can name them.

    Raises:
        FileNotFoundError: no predictions of this name.
        ValueError: photographs other than those of the set.
    """
    reference, name = Path(reference), Path(name)
    kind, number = name.name[:4], name.name[4:]
    sets = reference / "curation" / "sets"
    labels = read_submission(sets / f"test#{number}" / "test.csv" if kind == "test" else sets / "hard.csv")
    known = read_submission(sets / f"test#{number}" / "train.csv")["Id"]
    predictions = read_submission(name.with_suffix(".csv"))
    if sorted(predictions["Image"]) != sorted(labels["Image"]):
        raise ValueError(f"{name}.csv: not the photographs of the {kind} set")
    images, guesses = metrics.parse_predictions(predictions)
    truth = labels.set_index("Image")["Id"].loc[images].to_numpy(dtype=object)
    return images, guesses, truth, metrics.relabel_unseen(truth, known)


def score_predictions(reference: Path, name: Path) -> dict:
    """Score one prediction file, as `read_predictions` reads it, beside the score published with it.

    Returns:
        run, file, rows, relabelled (right labels changed), MAP@5, Top@1, Top@3, Top@5, the same followed by
        " published" (float, 5 decimals), and "MAP@5 without relabelling".

    Raises:
        FileNotFoundError: no predictions, or no score, of this name.
        ValueError: photographs other than those of the set, or a score that cannot be read.
    """
    reference, name = Path(reference), Path(name)
    images, guesses, truth, seen = read_predictions(reference, name)
    text = name.with_suffix(".md").read_text(encoding="utf-8")
    published = dict(re.findall(r"(MAP@5|Top@\d):\s*([\d.]+)", text))
    scores = {"MAP@5": metrics.map_at_k(guesses, seen)}
    scores |= {f"Top@{k}": metrics.top_k_accuracy(guesses, seen, k) for k in (1, 3, 5)}
    if set(published) != set(scores):
        found = ", ".join(published) or "none"
        raise ValueError(f"{name}.md: should give {', '.join(scores)}; gives {found}")
    return {
        "run": name.parent.relative_to(reference / "predictions").as_posix(),
        "file": name.name,
        "rows": len(images),
        "relabelled": int((seen != truth).sum()),
        **scores,
        **{f"{score} published": float(published[score]) for score in scores},
        "MAP@5 without relabelling": metrics.map_at_k(guesses, truth),
    }


def prediction_runs(reference: Path) -> pd.DataFrame:
    """`score_predictions` of every file found, one row each; FileNotFoundError if there is none."""
    names = find_predictions(reference)
    if not names:
        raise FileNotFoundError(f"{Path(reference) / 'predictions'}: no testN.csv or hardN.csv in any folder")
    return pd.DataFrame([score_predictions(reference, name) for name in names])


COMPARED = (
    ("1st-solution", "2nd-solution"),
    ("3rd-solution", "2nd-solution"),
    ("gcn", "2nd-solution"),
    ("lcn", "2nd-solution"),
    ("no-cn", "2nd-solution"),
    ("swa, best validation", "2nd-solution"),
    ("swa, epoch 100", "2nd-solution"),
    ("gcn", "no-cn"),
    ("lcn", "no-cn"),
    ("lcn", "gcn"),
    ("swa, best validation", "no-cn"),
    ("swa, best validation", "gcn"),
    ("swa, best validation", "lcn"),
    ("swa, epoch 100", "swa, best validation"),
)
"""Runs of `report.published_runs` that `follow_up` compares, photograph by photograph."""


def follow_up(reference: Path) -> pd.DataFrame:
    """The columns of `whalelib.report.follow_up`, of those runs whose predictions are found."""
    at_hand = {(name.parent.name, name.name): name for name in find_predictions(reference)}
    files = ("test1", "test2", "hard1", "hard2")
    pairs = [((run, file), (other, file)) for run, other in COMPARED for file in files]
    pairs += [((run, "hard2"), (run, "hard1")) for run in sorted({*sum(COMPARED, ())})]
    ranks, tables = {name: _ranks(reference, at_hand[name]) for name in at_hand}, []
    for one, other in pairs:
        if one in ranks and other in ranks:
            counts = pd.crosstab(ranks[one], ranks[other].loc[ranks[one].index])
            counts = counts.reindex(range(1, 7), fill_value=0).reindex(columns=range(1, 7), fill_value=0)
            table = counts.set_axis([*"12345", "none"], axis=1).reset_index(drop=True)
            table.insert(0, "rank", [*"12345", "none"])
            keys = dict(zip(("run", "file", "other", "other_file"), (*one, *other), strict=True))
            tables.append(pd.DataFrame([keys] * 6).join(table))
    if not tables:
        raise FileNotFoundError(f"{Path(reference) / 'predictions'}: no two runs to compare")
    return pd.concat(tables, ignore_index=True)


def _ranks(reference: Path, name: Path) -> pd.Series:
    """Return the rank of the right label by photograph, 6 where it is not among the five guesses."""
    images, guesses, _, seen = read_predictions(reference, name)
    points = metrics.average_precision_at_k(guesses, seen)
    return pd.Series(np.where(points > 0, np.round(1 / np.maximum(points, 0.2)), 6).astype(int), index=images)


def _photographs(sizes: pd.DataFrame) -> list[pd.Series]:
    rows = sizes.loc[sizes.index.repeat(sizes["photographs"])]
    return [rows["split"], rows["width"], rows["height"]]


def _sizes_by_split(reference: Path) -> pd.DataFrame:
    sizes = image_size_counts(reference)
    table = sizes.pivot_table(index=["width", "height"], columns="split", values="photographs", fill_value=0)
    return table[list(SPLITS)].astype(int).rename_axis(columns=None)


def _by_split(frame: pd.DataFrame, measure) -> list:
    return [*(measure(frame[frame["split"] == split]) for split in SPLITS), measure(frame)]


def _share(sizes: pd.DataFrame, condition: str) -> list[float]:
    return _by_split(
        sizes, lambda part: part.query(condition)["photographs"].sum() / part["photographs"].sum()
    )

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from whalelib.data import NEW_WHALE, Catalog, CatalogError, open_catalog, statistics


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("WHALE_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("WHALE_KAGGLE", raising=False)


def photograph(path, seed=0, size=(24, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def kaggle(root, train, test=(), sample=None):
    """Kaggle's layout with the given (name, identity) rows and a photograph for each name."""
    names = [(root / "train" / name) for name, _ in train] + [root / "test" / name for name in test]
    (root / "train").mkdir(parents=True, exist_ok=True)
    for seed, path in enumerate(dict.fromkeys(names)):
        photograph(path, seed)
    write(root / "train.csv", ["Image,Id", *(f"{name},{identity}" for name, identity in train)])
    if sample is not None:
        write(root / "sample_submission.csv", ["Image,Id", *(f"{name},new_whale w_1" for name in sample)])
    return root


def write(path, lines, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{line}\n" for line in lines).encode(encoding))


def problems(catalog):
    return [tuple(None if pd.isna(v) else v for v in row) for row in catalog.problems.itertuples(index=False)]


def refused(path):
    with pytest.raises(CatalogError) as error:
        open_catalog(path)
    assert all(
        f"{row.file}, row {row.row}: {row.problem}" in str(error.value) or pd.isna(row.row)
        for row in error.value.problems.itertuples()
    )
    return error.value


ABC = [("a.jpg", "w_2"), ("b.jpg", "w_1"), ("c.jpg", NEW_WHALE)]


# Layouts


def test_kaggle_layout(tmp_path):
    root = kaggle(tmp_path / "whales", ABC, test=["e.jpg", "d.jpg"], sample=["e.jpg", "d.jpg"])
    catalog = open_catalog(root)
    assert (catalog.name, catalog.root, len(catalog)) == ("whales", root, 5)
    table = catalog.table
    assert list(table.columns) == ["image", "identity", "path", "split", "source", "row"]
    assert table["image"].tolist() == ["a.jpg", "b.jpg", "c.jpg", "e.jpg", "d.jpg"]
    assert table["identity"].tolist()[:3] == ["w_2", "w_1", NEW_WHALE] and table["identity"][3:].isna().all()
    assert table["split"].tolist() == ["train"] * 3 + ["test"] * 2
    assert table["path"].tolist() == [
        str(root / s / n) for s, n in zip(table["split"], table["image"], strict=True)
    ]
    assert table["row"].tolist() == [2, 3, 4, 2, 3]
    assert catalog.known == ["w_1", "w_2"]
    assert not catalog.has_test_labels and problems(catalog) == [] and catalog.report_problems() == ""
    assert (len(catalog.train), len(catalog.test)) == (3, 2)
    assert catalog.test.table.index.tolist() == [0, 1]
    assert "5 photographs (3 train, 2 test), 2 known" in repr(catalog)


def test_kaggle_layout_without_test_or_sample(tmp_path):
    assert len(open_catalog(kaggle(tmp_path, ABC)).test) == 0
    catalog = open_catalog(kaggle(tmp_path, ABC, test=["z.jpg", "d.jpg"]))
    assert catalog.test.table["image"].tolist() == ["d.jpg", "z.jpg"]
    assert problems(catalog) == []


def test_test_labels(tmp_path):
    root = kaggle(tmp_path, ABC, test=["d.jpg", "e.jpg"])
    write(root / "test_labels.csv", ["Image,Id", "e.jpg,w_9", "d.jpg,new_whale"])
    catalog = open_catalog(root)
    assert catalog.test.table["identity"].tolist() == [NEW_WHALE, "w_9"]
    assert catalog.has_test_labels and catalog.known == ["w_1", "w_2"] and problems(catalog) == []
    write(root / "test_labels.csv", ["Image,Id", "e.jpg,w 9", "x.jpg,w_1"])
    catalog = open_catalog(root)
    assert len(catalog.test) == 2 and not catalog.has_test_labels
    assert [p[:2] for p in problems(catalog)] == [
        ("test_labels.csv", 2),
        ("test_labels.csv", 3),
        ("test_labels.csv", None),
    ]


def test_labels_with_images_and_masks(tmp_path):
    write(tmp_path / "labels.csv", ["Image,Id", "a.jpg,w_1", "b.jpg,new_whale", "c.jpg,w_2"])
    for name in ("images/a.jpg", "images/b.jpg", "images/c.jpg", "masks/a.jpg", "masks/b.png", "masks/x.png"):
        photograph(tmp_path / name)
    catalog = open_catalog(tmp_path)
    masks = catalog.table["mask"]
    assert masks[:2].tolist() == [str(tmp_path / "masks/a.jpg"), str(tmp_path / "masks/b.png")] and pd.isna(
        masks[2]
    )
    assert set(catalog.table["split"]) == {"train"}
    assert problems(catalog) == [("masks/x.png", None, "the mask of no photograph here", "skipped")]


def test_metadata_of_any_animal(tmp_path):
    for name in ("images/x/1.jpg", "images/2.jpg", "images/3.jpg", "images/4.jpg", "m.png"):
        photograph(tmp_path / name)
    lines = [
        ",image_id,identity,path,split,bbox,mask,nose_x,nose_y,species",
        '0,17,lynx1,images/x/1.jpg,database,"[1, 2.5, 10, 5]",m.png,3,4,lynx',
        "1,two,unknown,images/2.jpg,train,,,,,lynx",
        "2,three,,images/3.jpg,query,nan,,,,lynx",
        '3,four,NA,images/4.jpg,test,"(0, 0, 4, 4)",,1,1,lynx',
    ]
    write(tmp_path / "lynx.csv", lines)
    catalog = open_catalog(tmp_path / "lynx.csv")
    table = catalog.table.set_index("image")
    assert table.index.tolist() == ["17", "two", "three", "four"]
    assert table["identity"].fillna("-").tolist() == ["lynx1", NEW_WHALE, "-", "NA"]
    assert table["split"].tolist() == ["train", "train", "test", "test"]
    assert table.loc["17", ["x0", "y0", "x1", "y1"]].tolist() == [1, 2.5, 11, 7.5]
    assert table.loc["four", ["x0", "y0", "x1", "y1"]].tolist() == [0, 0, 4, 4]
    assert table.loc[["two", "three"], ["x0", "y0", "x1", "y1", "nose_x"]].isna().all(axis=None)
    assert table.loc["17", ["nose_x", "nose_y"]].tolist() == [3, 4]
    assert table.loc["17", "mask"] == str(tmp_path / "m.png") and table["mask"].isna().sum() == 3
    assert catalog.root == tmp_path and catalog.name == tmp_path.name
    assert problems(catalog) == [
        ("lynx.csv", None, "the identity 'unknown' of 1 rows is read as new_whale", "repaired")
    ]
    shutil.copy(tmp_path / "lynx.csv", tmp_path / "metadata.csv")
    assert open_catalog(tmp_path).table.drop(columns="source").equals(catalog.table.drop(columns="source"))


def test_folder_per_individual(tmp_path):
    for name in (
        "w_1/b.jpg",
        "w_1/a.PNG",
        "w_2/a.jpg",
        "new_whale/z.jpg",
        "loose.jpg",
        ".cache/x.jpg",
        "Old Tom/1.jpg",
    ):
        photograph(tmp_path / name)
    (tmp_path / "w_2/notes.txt").write_text("calf")
    (tmp_path / "w_2/Thumbs.db").write_text("")
    (tmp_path / "README.md").write_text("")
    (tmp_path / "w_2/more.jpg").mkdir()
    (tmp_path / "empty").mkdir()
    catalog = open_catalog(tmp_path)
    assert catalog.table["image"].tolist() == ["new_whale/z.jpg", "w_1/a.PNG", "w_1/b.jpg", "w_2/a.jpg"]
    assert catalog.table["identity"].tolist() == [NEW_WHALE, "w_1", "w_1", "w_2"]
    found = {file: (problem, action) for file, _, problem, action in problems(catalog)}
    assert set(found) == {"loose.jpg", "Old Tom/", "w_2/notes.txt", "w_2/more.jpg", "empty/"}
    assert "'Old Tom' has a space" in found["Old Tom/"][0] and "1 photograph" in found["Old Tom/"][0]
    assert {action for _, action in found.values()} == {"skipped"}


def test_boxes_and_truth(tmp_path):
    root = kaggle(tmp_path, ABC, test=["d.jpg"])
    write(
        root / "boxes.csv",
        [
            "Image,x0,y0,x1,y1",
            "a.jpg,1,2,10,12",
            "d.jpg,0,0,5,5",
            "b.jpg,9,0,5,5",
            "c.jpg,x,0,5,5",
            "other.jpg,0,0,1,1",
            "a.jpg,1,1,2,2",
        ],
    )
    catalog = open_catalog(root)
    table = catalog.table.set_index("image")
    assert table.loc["a.jpg", ["x0", "y0", "x1", "y1"]].tolist() == [1, 2, 10, 12]
    assert table.loc["d.jpg", "x1"] == 5 and table.loc[["b.jpg", "c.jpg"], "x0"].isna().all()
    assert sorted(p[1] or 0 for p in problems(catalog)) == [0, 4, 5, 7]
    photograph(root / "truth/masks/a.png")
    write(
        root / "truth/photographs.csv",
        [
            "image,split,x0,y0,x1,y1,mask,notch_x,notch_y,yaw",
            "a.jpg,train,0,0,3,3,masks/a.png,5,6,1",
            "b.jpg,train,1,1,2,2,masks/b.png,7,,1",
            "e.jpg,earlier,0,0,1,1,,,,1",
        ],
    )
    catalog = open_catalog(root)
    table = catalog.table.set_index("image")
    assert table.loc["a.jpg", "x1"] == 10 and table.loc["b.jpg", "x1"] == 2, (
        "boxes.csv overrules, the truth fills"
    )
    assert table.loc["a.jpg", ["notch_x", "notch_y"]].tolist() == [5, 6] and pd.isna(
        table.loc["b.jpg", "notch_x"]
    )
    assert table.loc["a.jpg", "mask"] == str(root / "truth/masks/a.png")
    assert (
        "truth/photographs.csv",
        3,
        "b.jpg: its mask masks/b.png: the file is missing",
        "skipped",
    ) in problems(catalog)
    assert (
        "truth/photographs.csv",
        3,
        "b.jpg: its notch makes no sense and is left out (7, )",
        "skipped",
    ) in problems(catalog)
    assert "yaw" not in table


def test_no_layout_says_what_was_looked_for(tmp_path):
    with pytest.raises(CatalogError) as error:
        open_catalog(tmp_path)
    for part in (
        "train.csv (missing)",
        "labels.csv (missing)",
        "metadata.csv (missing)",
        "folder per individual",
    ):
        assert part in str(error.value)
    photograph(tmp_path / "a.jpg")
    with pytest.raises(CatalogError, match="no layout"):
        open_catalog(tmp_path)
    # train/ and test/ without train.csv are not two individuals.
    photograph(tmp_path / "train/a.jpg")
    photograph(tmp_path / "test/b.jpg")
    with pytest.raises(CatalogError, match=r"train.csv \(missing\), train/ \(found\)"):
        open_catalog(tmp_path)


def test_two_layouts_are_ambiguous(tmp_path):
    root = kaggle(tmp_path, ABC)
    write(root / "labels.csv", ["Image,Id"])
    (root / "images").mkdir()
    with pytest.raises(
        CatalogError, match=r"more than one layout: Kaggle's \(train.csv, train/\) and labels"
    ):
        open_catalog(root)


def test_wrong_specs(tmp_path):
    with pytest.raises(CatalogError, match="does not exist"):
        open_catalog(tmp_path / "nowhere")
    (tmp_path / "a.txt").touch()
    with pytest.raises(CatalogError, match="neither a folder nor a CSV"):
        open_catalog(tmp_path / "a.txt")
    with pytest.raises(CatalogError, match="give its folder"):
        open_catalog(kaggle(tmp_path, ABC) / "train.csv")


@pytest.mark.parametrize(
    "spec", ["world:", "world:huge", "world:lab@", "world:lab@x", "world:lab@-1", "world@7", "world:lab@1@2"]
)
def test_wrong_worlds(spec):
    with pytest.raises(CatalogError, match=r"world"):
        open_catalog(spec)


@pytest.mark.parametrize(
    "spec, made, name",
    [
        ("world", ("lab", 2019), "world:lab@2019"),
        ("world:tiny", ("tiny", 2019), "world:tiny@2019"),
        ("world:competition@7", ("competition", 7), "world:competition@7"),
    ],
)
def test_worlds(tmp_path, monkeypatch, spec, made, name):
    root, asked = kaggle(tmp_path, ABC), []
    monkeypatch.setattr(
        "whalelib.data.world.make_world", lambda preset, seed: asked.append((preset, seed)) or root
    )
    assert open_catalog(spec).name == name and asked == [made]


def test_kaggle_spec(tmp_path, monkeypatch):
    monkeypatch.setenv("WHALE_KAGGLE", str(kaggle(tmp_path / "here", ABC)))
    catalog = open_catalog("kaggle")
    assert (catalog.name, catalog.root) == ("kaggle", tmp_path / "here")
    monkeypatch.setenv("WHALE_KAGGLE", str(tmp_path / "nowhere"))
    with pytest.raises(CatalogError, match="WHALE_KAGGLE names"):
        open_catalog("kaggle")
    monkeypatch.delenv("WHALE_KAGGLE")
    monkeypatch.setattr("whalelib.data.catalog.KAGGLE_FOLDERS", (tmp_path / "no", tmp_path / "here"))
    assert open_catalog("kaggle").root == tmp_path / "here"
    monkeypatch.setattr("whalelib.data.catalog.KAGGLE_FOLDERS", (tmp_path / "no",))
    with pytest.raises(CatalogError, match="looked for"):
        open_catalog("kaggle")


# Faults of the CSV


@pytest.mark.parametrize("header", ["image,label", "Image", "Image;Id", "Id,Name"])
def test_wrong_columns(tmp_path, header):
    root = kaggle(tmp_path, ABC)
    write(root / "train.csv", [header, "a.jpg,w_1"])
    error = refused(root)
    assert error.problems[["file", "row", "action"]].values.tolist() == [["train.csv", 1, "refused"]]
    assert "no column" in str(error) and header.replace(",", ", ") in str(error)


def test_column_twice(tmp_path):
    root = kaggle(tmp_path, ABC)
    write(root / "train.csv", ["Image,Id,Id", "a.jpg,w_1,w_2"])
    assert "more than one column Id" in str(refused(root))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf_16(tmp_path, encoding):
    root = kaggle(tmp_path, ABC)
    write(root / "train.csv", ["Image,Id", "a.jpg,w_1"], encoding)
    assert "train.csv, row 1: not UTF-8 text" in str(refused(root))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_latin_1_is_refused_at_its_row(tmp_path, end):
    root = kaggle(tmp_path, ABC)
    (root / "train.csv").write_bytes(
        end.join(["Image,Id", "a.jpg,w_1", "b.jpg,Québec", ""]).encode("latin-1")
    )
    assert "train.csv, row 3: byte 0xe9 is not UTF-8" in str(refused(root))


def test_byte_order_mark_is_repaired(tmp_path):
    root = kaggle(tmp_path, ABC)
    write(root / "train.csv", ["Image,Id", "a.jpg,w_1"], "utf-8-sig")
    catalog = open_catalog(root)
    assert catalog.known == ["w_1"]
    assert ("train.csv", 1, "the byte order mark before the header is ignored", "repaired") in problems(
        catalog
    )


def test_empty_csv(tmp_path):
    root = kaggle(tmp_path, ABC)
    (root / "train.csv").write_bytes(b"")
    assert "train.csv: the file is empty; it needs the columns Image, Id" in str(refused(root))
    (root / "train.csv").write_bytes(b"Image,Id\n")
    assert "no photograph is left" in str(refused(root))


def test_csv_is_a_folder(tmp_path):
    root = kaggle(tmp_path, ABC, test=["d.jpg"])
    (root / "test_labels.csv").mkdir()
    assert len(open_catalog(root).test) == 1
    (root / "train.csv").unlink()
    (root / "train.csv").mkdir()
    with pytest.raises(CatalogError, match=r"train.csv \(missing\)"):
        open_catalog(root)


def test_ragged_rows_and_broken_quotes(tmp_path):
    root = kaggle(tmp_path, ABC)
    write(root / "train.csv", ["Image,Id", "a.jpg", "", "b.jpg,w_1", "c.jpg,w_1,extra"])
    assert [p[:2] for p in problems(open_catalog(root))][:2] == [("train.csv", 2), ("train.csv", 5)]
    write(root / "train.csv", ["Image,Id", 'a.jpg,"w_1"x'])
    assert "train.csv, row 2: not CSV" in str(refused(root))


def test_rows_are_lines_of_the_file(tmp_path):
    root = kaggle(tmp_path, ABC)
    (root / "train.csv").write_bytes(
        b'Image,Id\r\na.jpg,w_1\r\n\r\n"b\n.jpg",w_1\r\nno.jpg,w_1\r\nc.jpg,w_1\r\n'
    )
    assert [p[1] for p in problems(open_catalog(root))][:2] == [4, 6]
    assert open_catalog(root).table["row"].tolist() == [2, 7]


def test_na_is_an_identity(tmp_path):
    root = kaggle(tmp_path, [("a.jpg", "NA"), ("b.jpg", "null"), ("c.jpg", "007")])
    assert open_catalog(root).known == ["007", "NA", "null"]


# Faults of the rows


def test_name_listed_twice(tmp_path):
    root = kaggle(tmp_path, [*ABC, ("a.jpg", "w_2"), ("b.jpg", "w_7"), ("d.jpg", "w_1")])
    catalog = open_catalog(root)
    assert catalog.table["image"].tolist() == ["a.jpg", "c.jpg", "d.jpg"]
    assert [(p[0], p[1], p[3]) for p in problems(catalog)] == [("train.csv", n, "skipped") for n in (3, 5, 6)]
    text = catalog.report_problems()
    assert "train.csv, row 3: b.jpg: listed more than once and differently, here with identity w_1" in text
    assert "train.csv, row 5: a.jpg: listed more than once; row 2 is used" in text


def test_name_listed_twice_in_metadata_with_other_paths(tmp_path):
    photograph(tmp_path / "1.jpg")
    photograph(tmp_path / "2.jpg")
    write(tmp_path / "m.csv", ["image_id,identity,path", "1,a,1.jpg", "1,a,2.jpg", "2,a,2.jpg"])
    catalog = open_catalog(tmp_path / "m.csv")
    assert catalog.table["image"].tolist() == ["2"] and [p[1] for p in problems(catalog)] == [2, 3]


def test_duplicate_across_train_and_test(tmp_path):
    root = kaggle(tmp_path, ABC, test=["d.jpg", "a.jpg"], sample=["d.jpg", "a.jpg"])
    shutil.copy(root / "train/b.jpg", root / "test/d.jpg")
    catalog = open_catalog(root)
    assert catalog.test.table["image"].tolist() == ["d.jpg"], "a copy under another name stays"
    (problem,) = problems(catalog)
    assert problem[:2] == ("sample_submission.csv", 3) and "train.csv, row 2" in problem[2]


def test_missing_file_folder_and_unlisted(tmp_path):
    root = kaggle(tmp_path, ABC, test=["d.jpg", "x.jpg"], sample=["d.jpg", "e.jpg", "d.jpg"])
    (root / "train/a.jpg").unlink()
    (root / "train/b.jpg").unlink()
    (root / "train/b.jpg").mkdir()
    photograph(root / "train/extra.jpg")
    catalog = open_catalog(root)
    assert catalog.table["image"].tolist() == ["c.jpg", "d.jpg"]
    assert problems(catalog) == [
        ("train.csv", 2, "train/a.jpg: the file is missing", "skipped"),
        ("train.csv", 3, "train/b.jpg: a folder, not a file", "skipped"),
        ("train/extra.jpg", None, "not listed in train.csv", "skipped"),
        ("test/x.jpg", None, "not listed in sample_submission.csv", "skipped"),
        ("sample_submission.csv", 4, "d.jpg: listed more than once; row 2 is used", "skipped"),
        ("sample_submission.csv", 3, "test/e.jpg: the file is missing", "skipped"),
    ]


@pytest.mark.parametrize("identity", ["w 1", "", " w_1", "w_1 ", "w\t1", "w\u00a01"])
def test_identity_with_a_space_or_empty(tmp_path, identity):
    catalog = open_catalog(kaggle(tmp_path, [("a.jpg", identity), ("b.jpg", "w_1")]))
    assert catalog.table["image"].tolist() == ["b.jpg"]
    (problem,) = problems(catalog)
    assert problem[:2] == ("train.csv", 2) and ("space" in problem[2] or "no identity" in problem[2])


@pytest.mark.parametrize(
    "name", ["../out.jpg", "sub/../../out.jpg", "{out}", "link.jpg", "away/out.jpg", "../train"]
)
def test_path_leaving_the_folder(tmp_path, name):
    out = photograph(tmp_path / "out.jpg")
    root = kaggle(tmp_path / "root", [("a.jpg", "w_1")])
    (root / "train/link.jpg").symlink_to(out)
    (root / "train/away").symlink_to(tmp_path)
    write(root / "train.csv", ["Image,Id", "a.jpg,w_1", f"{name.format(out=out)},w_2", "no.jpg,w_1"])
    if name == "../train":
        assert problems(open_catalog(root))[0][2] == "train/../train: a folder, not a file"
        return
    error = refused(root)
    assert "train.csv, row 3" in str(error) and "leads out of the folder (refused)" in str(error)
    assert "train.csv, row 4" in str(error), "the other problems are listed too"


def test_folder_of_an_individual_that_is_a_link_out(tmp_path):
    photograph(tmp_path / "elsewhere/a.jpg")
    photograph(tmp_path / "root/w_1/a.jpg")
    (tmp_path / "root/w_2").symlink_to(tmp_path / "elsewhere")
    assert "w_2/a.jpg: w_2/a.jpg: leads out" in str(refused(tmp_path / "root"))


def test_links_inside_and_a_linked_folder_are_fine(tmp_path):
    root = kaggle(tmp_path / "root", ABC)
    shutil.move(root / "train", tmp_path / "disk")
    (root / "train").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/a.jpg").unlink()
    (tmp_path / "disk/a.jpg").symlink_to("b.jpg")
    assert len(open_catalog(root).verified()) == 3
    os.symlink(root, tmp_path / "alias")
    assert len(open_catalog(tmp_path / "alias").verified()) == 3


def test_strange_names(tmp_path):
    root = kaggle(tmp_path, ABC)
    write(root / "train.csv", ["Image,Id", "a.jpg,w_1", "b\0.jpg,w_1"])
    assert "not UTF-8 text" in str(refused(root))
    write(
        root / "train.csv",
        ["Image,Id", "a.jpg,w_1", ",w_1", f"{'x' * 999}.jpg,w_1", ".,w_1", "a.jpg/b.jpg,w_1"],
    )
    catalog = open_catalog(root)
    assert catalog.table["image"].tolist() == ["a.jpg"]
    assert [p[1] for p in problems(catalog) if p[1]] == [3, 4, 5, 6]
    (root / "test").mkdir()
    os.rename(photograph(root / "test/d.jpg"), os.fsencode(root) + b"/test/d\xff.jpg")
    assert problems(open_catalog(root))[-1][:1] + problems(open_catalog(root))[-1][2:] == (
        "test/d\\udcff.jpg",
        "the name is not UTF-8",
        "skipped",
    )


def test_metadata_rows(tmp_path):
    for name in ("1.jpg", "2.jpg"):
        photograph(tmp_path / name)
    lines = [
        "image_id,identity,path,split,bbox",
        "1,a,1.jpg,train,",
        ",a,2.jpg,train,",
        "3,a,2.jpg,val,",
        "4,,2.jpg,train,",
        '5,a,2.jpg,train,"[1, 2, 3]"',
        '6,a,2.jpg,train,"[1, 2, -3, 4]"',
        "7,a,9.jpg,train,",
    ]
    write(tmp_path / "m.csv", lines)
    catalog = open_catalog(tmp_path / "m.csv")
    assert catalog.table["image"].tolist() == ["1", "5", "6"] and catalog.table["x0"].isna().all()
    assert sorted(p[1] for p in problems(catalog)) == [3, 4, 5, 6, 7, 8]
    assert "'val' is none of train, database, gallery, test, query" in catalog.report_problems()
    write(tmp_path / "m.csv", ["image_id,identity,path", "1,a,../x/1.jpg", "2,a,2.jpg"])
    assert "m.csv, row 2: ../x/1.jpg: leads out of the folder" in str(refused(tmp_path / "m.csv"))


def test_many_problems_are_counted(tmp_path):
    root = kaggle(tmp_path, ABC)
    write(
        root / "train.csv",
        ["Image,Id", "a.jpg,w_1", "b.jpg,w 1", *(f"{n}.jpg,w_1" for n in range(50)), "c.jpg,w_1"],
    )
    catalog = open_catalog(root)
    text = catalog.report_problems()
    assert len(catalog.problems) == 51 and "51 skipped" in text
    assert "train.csv: and 30 more like these" in text and "b.jpg: the identity 'w 1' has a space" in text
    assert len(text.splitlines()) == 1 + 1 + 20 + 1


# The catalog itself


def test_verified_moves_unreadable_photographs_to_problems(tmp_path):
    root = kaggle(tmp_path, [*ABC, ("d.png", "w_3")], test=["e.jpg", "f.jpg"])
    for name in ("train/a.jpg", "test/e.jpg"):
        path = root / name
        path.write_bytes(path.read_bytes()[:200])
    (root / "train/b.jpg").write_bytes(b"")
    Image.fromarray(np.full((4, 5), 65535, dtype=np.uint16)).save(root / "train/d.png")
    catalog = open_catalog(root)
    assert problems(catalog) == []
    sound = catalog.verified()
    assert sound.table["image"].tolist() == ["c.jpg", "d.png", "f.jpg"] and len(catalog) == 6
    assert sound.known == ["w_3"]
    found = problems(sound)
    assert found[0][:2] == ("train.csv", 2) and "train/a.jpg: truncated or damaged" in found[0][2]
    assert found[1] == ("train.csv", 3, "train/b.jpg: the file is empty", "skipped")
    assert found[2] == ("train.csv", 5, "train/d.png: 16 bits a channel scaled to 8", "repaired")
    assert found[3][:2] == ("test/e.jpg", None) and found[3][3] == "skipped"
    assert problems(sound.verified()) == found, "verifying again tells nothing twice"
    assert sound.report_problems().startswith(f"Problems in {tmp_path.name}: 3 skipped, 1 repaired\n")


def test_nothing_left(tmp_path):
    root = kaggle(tmp_path, ABC)
    for name, _ in ABC:
        (root / "train" / name).write_bytes(b"")
    with pytest.raises(CatalogError, match="no photograph of") as error:
        open_catalog(root).verified()
    assert "train.csv, row 4: train/c.jpg: the file is empty (skipped)" in str(error.value)
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    with pytest.raises(CatalogError, match="no photograph is left") as error:
        open_catalog(root)
    assert len(error.value.problems) == 3


def test_duplicates_stay(tmp_path):
    root = kaggle(tmp_path, ABC)
    shutil.copy(root / "train/a.jpg", root / "train/b.jpg")
    assert len(open_catalog(root).verified()) == 3


def test_where(tmp_path):
    catalog = open_catalog(kaggle(tmp_path, ABC))
    some = catalog.where(catalog.table["identity"] == NEW_WHALE)
    assert some.table["image"].tolist() == ["c.jpg"] and some.table.index.tolist() == [0]
    assert len(catalog.where([True, False, True])) == 2 and len(catalog.where(np.zeros(3, dtype=bool))) == 0
    for wrong in ([True], [0, 1, 2], np.ones((3, 1), dtype=bool)):
        with pytest.raises(ValueError, match="3 booleans"):
            catalog.where(wrong)


def test_fingerprint(tmp_path):
    root = kaggle(tmp_path / "one", ABC)
    catalog = open_catalog(root)
    first = catalog.fingerprint
    assert first == open_catalog(root).fingerprint == catalog.fingerprint and len(first) == 16
    shutil.copytree(root, tmp_path / "two")
    assert open_catalog(tmp_path / "two").fingerprint == first, "the place doesn't matter"
    os.utime(root / "train/a.jpg", (1, 1))
    assert open_catalog(root).fingerprint != first
    assert catalog.train.where([True, True, False]).fingerprint != catalog.fingerprint
    (tmp_path / "two/train/a.jpg").write_bytes(b"")
    assert open_catalog(tmp_path / "two").fingerprint != first
    write(root / "train.csv", ["Image,Id", "a.jpg,w_2", "b.jpg,w_1", "c.jpg,w_1"])
    assert len({first, open_catalog(root).fingerprint, catalog.fingerprint}) == 3


def test_fingerprint_of_masks(tmp_path):
    root = kaggle(tmp_path, ABC)
    photograph(root / "masks/a.jpg")
    first = open_catalog(root).fingerprint
    photograph(root / "masks/a.jpg", seed=9, size=(30, 30))
    assert open_catalog(root).fingerprint != first


@pytest.mark.parametrize(
    "change, told",
    [
        ({"image": ["a.jpg", "a.jpg", "c.jpg"]}, "row 1: .*image"),
        ({"identity": ["w_1", "w 1", "w_1"]}, "row 1: no space, not empty is needed"),
        ({"identity": ["w_1", "", "w_1"]}, "row 1: no space, not empty is needed"),
        ({"split": ["train", "test", "val"]}, "row 2: train or test is needed, not 'val'"),
        ({"path": ["/a", "/b", "c"]}, "row 2: an absolute path is needed, not 'c'"),
        ({"x0": 1.0, "y0": 1.0, "x1": [2.0, np.nan, 1.0], "y1": 2.0}, "row 1: x0 < x1"),
        ({"x0": 1.0}, "x0 < x1"),
        ({"notch_x": "left", "notch_y": 1.0}, "float64"),
    ],
)
def test_schema(tmp_path, change, told):
    catalog = open_catalog(kaggle(tmp_path, ABC))
    with pytest.raises(CatalogError, match=told):
        replace(catalog, table=catalog.table.assign(**change))
    with pytest.raises(CatalogError, match="split"):
        Catalog("made", tmp_path, catalog.table.drop(columns="split"), catalog.problems)


def test_catalog_made_by_hand(tmp_path):
    table = pd.DataFrame(
        {
            "image": ["a"],
            "identity": pd.Series([pd.NA], dtype="str"),
            "path": [str(photograph(tmp_path / "a.jpg"))],
            "split": ["test"],
            "x0": [1.0],
            "y0": [2.0],
            "x1": [3.0],
            "y1": [4.0],
        }
    )
    catalog = Catalog("made", tmp_path, table, pd.DataFrame(columns=["file", "row", "problem", "action"]))
    assert len(catalog.verified()) == 1 and catalog.known == [] and catalog.report_problems() == ""
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(CatalogError, match=r"a\.jpg: the file is empty"):
        catalog.verified()


def test_import_is_free_of_torch():
    code = "import sys, whalelib.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_opening_is_quick(tmp_path):
    names = [f"{n:06}.jpg" for n in range(5000)]
    (tmp_path / "train").mkdir()
    for name in names:
        (tmp_path / "train" / name).write_bytes(b"x")
    write(tmp_path / "train.csv", ["Image,Id", *(f"{name},w_1" for name in names)])
    began = time.process_time()
    assert len(open_catalog(tmp_path).fingerprint) == 16
    assert time.process_time() - began < 5


def test_names_with_folders(tmp_path):
    root = kaggle(tmp_path, [("2019/a.jpg", "w_1"), ("b.jpg", "w_2"), ("./c.jpg", "w_3")])
    photograph(root / "train/d/x.jpg")
    catalog = open_catalog(root)
    assert catalog.table["image"].tolist() == ["2019/a.jpg", "b.jpg", "./c.jpg"]
    assert problems(catalog) == [("train/d", None, "a folder, not a file", "skipped")]


def test_where_takes_what_statistics_give(tmp_path):
    catalog = open_catalog(kaggle(tmp_path, ABC))
    assert len(catalog.where(statistics(catalog)["gray_strict"])) == 0

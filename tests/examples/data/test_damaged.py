"""Damaged data sets: every layout with every damage is refused by a message that names the file."""

from __future__ import annotations

import json
import re
import shutil
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import SimpleITK
from numpy.typing import NDArray
from PIL import Image
from scipy.io import loadmat, savemat

from data.layouts import LAYOUTS, save, save_volume, spine, write_folders
from segmentation.data.datamodule import find_items
from segmentation.tasks import get_task

Damage = Callable[[Path], None]


def rewritten(change: Callable[[bytes], bytes]) -> Damage:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def redrawn(change: Callable[[Image.Image], NDArray]) -> Damage:
    def damage(path: Path) -> None:
        with Image.open(path) as image:
            pixels = change(image)
        save(path, pixels.astype(np.uint8))

    return damage


def recast(change: Callable[[SimpleITK.Image], SimpleITK.Image]) -> Damage:
    return lambda path: SimpleITK.WriteImage(change(SimpleITK.ReadImage(str(path))), str(path), True)


def one_voxel(value: float) -> Damage:
    def change(volume: SimpleITK.Image) -> SimpleITK.Image:
        volume = SimpleITK.Cast(volume, SimpleITK.sitkFloat32)
        volume[2, 2, 2] = value
        return volume

    return recast(change)


def colours(image: Image.Image) -> NDArray:
    count = np.arange(image.width * image.height).reshape(image.height, image.width)
    return np.dstack([count % 97, count % 31, count % 2])


def header_of_mha(line: str) -> Damage:
    name = line.split()[0].encode()

    def change(content: bytes) -> bytes:
        changed, count = re.subn(rb"%b = [^\n]*" % name, line.encode(), content, count=1)
        assert count == 1
        return changed

    return rewritten(change)


def bit_rot(content: bytes) -> bytes:
    middle = (content.find(b"LOCAL") + len(content)) // 2
    return content[:middle] + bytes(30) + content[middle + 30 :]


class Victim(NamedTuple):
    layout: str
    key: str  # what both names share
    image: str
    mask: str


ISIC, BUSI = "ISIC-2017_Training", "Dataset_BUSI_with_GT"
PICTURES = [
    Victim("table", "1", "images/1.png", "masks/1.png"),
    Victim("isic2017", "ISIC_0000001", f"{ISIC}_Data/{{}}.png", f"{ISIC}_Part1_GroundTruth/{{}}_segmentation.png"),
    Victim("hc18", "010_HC", "training_set/{}.png", "training_set/{}_Annotation.png"),
    Victim("busi", "benign (0)", f"{BUSI}/benign/{{}}.png", f"{BUSI}/benign/{{}}_mask.png"),
    Victim("nnunet", "case_1", "imagesTr/{}_0001.png", "labelsTr/{}.png"),
    Victim("folders", "case0", "images/{}.png", "masks/{}.png"),
    Victim("class_folders", "1", "images/{}.png", "masks/2/{}.png"),
    Victim("sides", "1", "val/images/{}.png", "val/masks/{}.png"),
]
VOLUMES = [
    Victim("spider", "2_t2", "images/{}.mha", "masks/{}.mha"),
    Victim("nnunet_volumes", "s1", "imagesTr/{}_0000.nii.gz", "labelsTr/{}.nii.gz"),
]
HTML = b"<!DOCTYPE html><title>404: this file has moved</title>\n" * 20
OF_FILES: dict[str, Damage] = {
    "cut": rewritten(lambda content: content[: len(content) // 2]),
    "cut_the_end": rewritten(lambda content: content[:-40]),
    "empty": rewritten(lambda content: b""),
    "text": rewritten(lambda content: HTML),
    "zeros": rewritten(lambda content: bytes(len(content))),
    "delete": Path.unlink,
}
OF_PICTURES = OF_FILES | {"other_size": redrawn(lambda image: np.asarray(image.convert("L").resize((17, 19))))}
OF_MASKS = OF_PICTURES | {
    "colours": redrawn(colours),
    "grey_steps": redrawn(lambda image: (np.asarray(image.convert("L")) > 0) * 77 + 3),
}
OF_VOLUMES = OF_FILES | {
    "other_shape": recast(lambda volume: volume[:-1, :, :]),
    "two_dimensions": recast(lambda volume: volume[:, :, 0]),
    "vectors": recast(lambda volume: SimpleITK.Compose(volume, volume)),
}
OF_VOLUME_MASKS = OF_VOLUMES | {"half_a_label": one_voxel(1.5), "unknown_label": one_voxel(77)}
OF_HEADERS = {
    line: header_of_mha(line)
    for line in (
        "NDims = x",
        "DimSize = 24 40",
        "DimSize = 24 40 50",
        "ElementSpacing = 0 1 1",
        "ElementType = MET_NONSENSE",
        "TransformMatrix = 1 0 0 0 0 0 0 0 1",
        "CompressedDataSize = 9",
    )
} | {"bit_rot": rewritten(bit_rot)}
CASES = [
    *((victim, "image", *damage) for victim in PICTURES for damage in OF_PICTURES.items()),
    *((victim, "mask", *damage) for victim in PICTURES for damage in OF_MASKS.items()),
    *((victim, "image", *damage) for victim in VOLUMES for damage in OF_VOLUMES.items()),
    *((victim, "mask", *damage) for victim in VOLUMES for damage in OF_VOLUME_MASKS.items()),
    *((VOLUMES[0], side, *damage) for side in ("image", "mask") for damage in OF_HEADERS.items()),
    (VOLUMES[0], "image", "not_a_number", one_voxel(float("nan"))),  # of NIfTI the reader itself makes zeros of such
]
# An outline is what is bright, whatever the value.
CASES = [case for case in CASES if (case[0].layout, *case[1:3]) != ("hc18", "mask", "grey_steps")]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every layout, undamaged."""
    root = tmp_path_factory.mktemp("layouts")
    for name, (_, write) in LAYOUTS.items():
        write(root / name)
    return root


def read_all(layout: str, root: Path) -> None:
    for item in find_items(get_task(LAYOUTS[layout][0]), root):
        item.read()


@pytest.mark.parametrize("case", CASES, ids=[f"{victim.layout}-{side}-{name}" for victim, side, name, _ in CASES])
def test_damaged_files_are_named(written, tmp_path, case):
    (layout, key, *files), side, name, damage = case
    shutil.copytree(written / layout, tmp_path / layout)
    path = tmp_path / layout / files[side == "mask"].format(key)
    damage(path)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read_all(layout, tmp_path / layout)
    assert (key if name == "delete" else str(path)) in str(caught.value)


def test_there_are_many_and_they_are_damaged(written):
    assert len(CASES) >= 150
    for layout in LAYOUTS:
        read_all(layout, written / layout)


def edit(old: str, new: str) -> Damage:
    def damage(path: Path) -> None:
        content = path.read_text()
        assert old in content
        path.write_text(content.replace(old, new))

    return damage


def write_text(content: str, encoding: str = "utf-8") -> Damage:
    return lambda path: path.write_bytes(content.encode(encoding))


def change_json(**entries: object) -> Damage:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def change_mat(**arrays: np.ndarray | None) -> Damage:
    def damage(path: Path) -> None:
        content = {name: value for name, value in loadmat(path).items() if name[0] != "_"} | arrays
        savemat(path, {name: value for name, value in content.items() if value is not None})

    return damage


HC18_TABLE = "training_set_pixel_size_and_HC.csv"
TABLES = [
    ("table", "items.csv", "empty", r"lacks the column\(s\) id, file, group: it begins with '',"),
    ("table", "items.csv", "zeros", "lacks the column|cannot be read as a table"),
    ("table", "items.csv", edit("id,file", "name,file"), r"lacks the column\(s\) id"),
    ("table", "items.csv", edit("group,split", "patient,split"), r"lacks the column\(s\) group"),
    ("table", "items.csv", write_text("id,file,group\n"), "lists no images"),
    ("table", "items.csv", edit("person_1", ""), "line 3: group is empty"),
    ("table", "items.csv", edit("1,1.png", "1,"), "line 3: file is empty"),
    ("table", "items.csv", edit("1,1.png", "1,9.png"), r"line 3: .*9\.png does not exist"),
    ("table", "items.csv", edit("0.25,101", "0.25,long"), "line 3: hc_mm is 'long'"),
    ("table", "items.csv", edit("0.25,101", "-0.25,101"), "line 3: resized_pixel_size_mm is '-0.25'"),
    ("table", "items.csv", edit("0.25,101", "inf,101"), "line 3: resized_pixel_size_mm is 'inf'"),
    ("table", "items.csv", write_text("id,file,group\n1,1.png,Jörg\n", "latin-1"), "cannot be read as a table"),
    ("table", "items.csv", write_text("id,file,group\n1,1.png,a\n", "utf-16"), "cannot be read as a table"),
    ("table", "items.csv", write_text('id,file,group\n1,"1.png,a\n'), "cannot be read as a table"),
    ("table", "items.csv", edit(",", ";"), r"lacks .* id, file, group: it begins with 'id;file;group;.*by commas"),
    ("hc18", HC18_TABLE, edit(",", ";"), r"lacks .* filename, .*: it begins with 'filename;.*separated by commas"),
    ("hc18", HC18_TABLE, "delete", "does not exist: it gives the pixel sizes"),
    ("hc18", HC18_TABLE, "empty", r"lacks the column\(s\) filename"),
    ("hc18", HC18_TABLE, "text", r"lacks the column\(s\) filename"),
    ("hc18", HC18_TABLE, edit("pixel size", "size"), r"lacks the column\(s\) pixel size"),
    ("hc18", HC18_TABLE, edit("head circumference", "hc"), r"lacks the column\(s\) head circumference"),
    ("hc18", HC18_TABLE, edit("010_HC.png,0.2", "010_HC.png,"), r"line 3: pixel size\(mm\) is ''"),
    ("hc18", HC18_TABLE, edit("010_HC.png,0.2", "010_HC.png,0"), r"line 3: pixel size\(mm\) is '0'"),
    ("hc18", HC18_TABLE, edit("010_HC.png,0.2,", "010_HC.png,0.2,?"), "line 3: head circumference .* is"),
    ("hc18", HC18_TABLE, edit("010_HC.png", "011_HC.png"), r"has no row for .*010_HC\.png \(1 such\)"),
    ("nnunet", "dataset.json", "delete", "does not exist: it gives the labels"),
    ("nnunet", "dataset.json", "cut", "cannot be read as JSON"),
    ("nnunet", "dataset.json", "empty", "cannot be read as JSON"),
    ("nnunet", "dataset.json", "zeros", "cannot be read as JSON"),
    ("nnunet", "dataset.json", write_text("[]"), "has no labels: it needs, for example"),
    ("nnunet", "dataset.json", change_json(labels={}), "has no labels"),
    ("nnunet", "dataset.json", change_json(labels={"background": 0, "a": 1, "ignore": 2}), "has an ignore label"),
    ("nnunet", "dataset.json", change_json(labels={"background": 0, "a": [1, 2]}), "regions are not supported"),
    ("nnunet", "dataset.json", change_json(labels={"background": 0, "a": "one"}), "no whole numbers"),
    ("nnunet", "dataset.json", change_json(labels={"background": 0, "a": 1, "b": 2}), "has the labels a, b: .*lesion"),
    ("nnunet", "splits_final.json", "cut", "cannot be read as JSON"),
    ("nnunet", "splits_final.json", write_text("[]"), "has no fold 0"),
    ("nnunet", "splits_final.json", write_text('[{"train": []}]'), "has no fold 0"),
    ("nnunet", "splits_final.json", edit("case_3", "case_9"), "case 'case_3' is in imagesTr, but not listed"),
    ("nnunet", "splits_final.json", edit('"case_0",', '"case_00", "case_0",'), "case 'case_00' is listed, but not in"),
    (
        "nnunet",
        "imagesTr/case_1_0001.png",
        lambda path: path.rename(path.with_name("case_1.png")),
        r"case_1\.png has no",
    ),
    ("nnunet", "imagesTr/case_1_0002.png", "delete", r"case_1_0001\.png is channel 2 of case 'case_1'.* takes 3"),
    ("matlab", "01.mat", "cut", "cannot be read as a MATLAB file"),
    ("matlab", "01.mat", "empty", "cannot be read as a MATLAB file"),
    ("matlab", "01.mat", "text", "cannot be read as a MATLAB file"),
    ("matlab", "01.mat", "zeros", "cannot be read as a MATLAB file|lacks GT, I"),
    ("matlab", "01.mat", write_text("MATLAB 7.3 MAT-file".ljust(124) + "\0\2IM"), "cannot be read as a MATLAB file"),
    ("matlab", "01.mat", change_mat(I=None), "lacks I: it needs the image I and the mask GT"),
    ("matlab", "01.mat", change_mat(GT=None), "lacks GT: it needs"),
    ("matlab", "01.mat", change_mat(GT=np.ones((40, 24))), r"holds GT of the shape \(40, 24\)"),
    ("matlab", "01.mat", change_mat(GT=np.ones((40, 24, 9))), r"holds GT of the shape \(40, 24, 9\) for I of"),
    ("matlab", "01.mat", change_mat(GT=np.ones((40, 23, 5))), "both must be of one shape"),
    ("matlab", "01.mat", change_mat(GT=np.full((40, 24, 5), 6)), "holds the value 6 in GT"),
    ("matlab", "01.mat", change_mat(GT=np.full((40, 24, 5), 0.5)), "holds fractions"),
    ("matlab", "01.mat", change_mat(GT=np.array("x")), "cannot|both must be|holds"),
    ("matlab", "01.mat", change_mat(I=np.full((40, 24, 5), np.nan)), "holds values that are not finite"),
]


@pytest.mark.parametrize(
    ("layout", "file", "damage", "message"), TABLES, ids=[f"{c[0]}-{k}" for k, c in enumerate(TABLES)]
)
def test_damaged_tables_say_what_is_wrong(written, tmp_path, layout, file, damage, message):
    shutil.copytree(written / layout, tmp_path / layout)
    path = tmp_path / layout / file
    OF_FILES.get(damage, damage)(path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        read_all(layout, tmp_path / layout)
    assert file.startswith("imagesTr") or str(path) in str(caught.value)


def test_headers_that_pillow_itself_trips_over(written, tmp_path):
    shutil.copytree(written / "folders", tmp_path / "folders")
    path = tmp_path / "folders" / "images" / "case0.png"
    content = path.read_bytes()
    short = content[12:28]  # IHDR without its last byte
    path.write_bytes(content[:8] + struct.pack(">I", 12) + short + struct.pack(">I", zlib.crc32(short)) + content[33:])
    with pytest.raises(ValueError, match=r"case0\.png cannot be read as an image"):
        read_all("folders", tmp_path / "folders")


def test_several_images_in_one_file(written, tmp_path):
    shutil.copytree(written / "folders", tmp_path / "folders")
    path = tmp_path / "folders" / "images" / "case0.png"
    with Image.open(path) as image:
        image.save(path.with_suffix(".tif"), save_all=True, append_images=[image.copy()])
    path.unlink()
    with pytest.raises(ValueError, match=r"case0\.tif holds 2 images: save each in a file of its own"):
        read_all("folders", tmp_path / "folders")


def test_official_masks_must_be_there(tmp_path):
    LAYOUTS["isic2017"][1](tmp_path)
    shutil.rmtree(tmp_path / "ISIC-2017_Test_v2_Part1_GroundTruth")
    with pytest.raises(FileNotFoundError, match="Test_v2_Data has no ISIC-2017_Test_v2_Part1_GroundTruth beside it"):
        read_all("isic2017", tmp_path)


def test_two_files_of_one_name(tmp_path):
    write_folders(tmp_path)
    shutil.copy(tmp_path / "images" / "case1.png", tmp_path / "images" / "case1.jpg")
    with pytest.raises(ValueError, match=r"case1\.png and case1\.jpg both belong to 'case1': keep one"):
        read_all("folders", tmp_path)
    (tmp_path / "images" / "case1.jpg").unlink()
    shutil.copy(tmp_path / "masks" / "case1_mask.png", tmp_path / "masks" / "case1.png")
    with pytest.raises(ValueError, match=r"case1_mask\.png and case1\.png both belong to 'case1': keep one"):
        read_all("folders", tmp_path)


@pytest.mark.parametrize(
    ("layout", "task", "message"),
    [
        ("hc18", "lumbar_spine", "holds outlines of heads, one class: task 'lumbar_spine' has 5"),
        ("busi", "lumbar_spine", "holds masks of lesions, one class: task 'lumbar_spine' has 5"),
        ("spider", "isic2017", "holds volumes of the spine: task 'isic2017' is not one of lumbar_spine, spine_v"),
        (
            "matlab",
            "spine_structures",
            "holds volumes of the spine: task 'spine_structures' is not one of lumbar_spine",
        ),
        ("class_folders", "lumbar_spine", "has the folders 0, 1, 2: task 'lumbar_spine' needs 0, 1, 2, 3, 4, for L1"),
        ("nnunet", "breast_lesion", r"case_0_0002.png is channel 3 of case 'case_0': task 'breast_lesion' takes 1"),
    ],
)
def test_tasks_that_a_data_set_does_not_serve(written, layout, task, message):
    with pytest.raises(ValueError, match=message):
        find_items(get_task(task), written / layout)


def test_volumes_that_number_bones_take_no_threshold(written):
    task = replace(get_task("spine_vertebrae"), mask_threshold=127)
    for layout in ("spider", "matlab"):
        with pytest.raises(ValueError, match=r"volumes that number every bone: leave data.mask_threshold out"):
            find_items(task, written / layout)


def test_volumes_that_hold_nothing_of_the_task(tmp_path):
    image, labels = spine(1)
    save_volume(tmp_path / "images" / "1_t2.mha", image)
    save_volume(tmp_path / "masks" / "1_t2.mha", np.where(labels > 99, labels, 0))
    with pytest.raises(ValueError, match="holds no image with a label of task 'lumbar_spine'"):
        read_all("spider", tmp_path)


def test_a_header_that_stands_on_its_head(tmp_path):
    image, labels = spine(1)
    save_volume(tmp_path / "images" / "1_t2.mha", image[:, ::-1])
    save_volume(tmp_path / "masks" / "1_t2.mha", labels[:, ::-1])
    with pytest.raises(ValueError, match=r"masks.1_t2\.mha counts its vertebrae from the top, if the header of"):
        read_all("spider", tmp_path)


def one_volume(
    layout: str, root: Path, image: NDArray, labels: NDArray, axes: str, mask_axes: str
) -> tuple[Path, Path]:
    """A data set of one volume, and the paths of its image and mask."""
    names = ("images/1_t2.mha", "masks/1_t2.mha") if layout == "spider" else ("imagesTr/1_0000.mha", "labelsTr/1.mha")
    for name, values, geometry in zip(names, (image, labels), (axes, mask_axes), strict=True):
        save_volume(root / name, values, geometry)
    values = {f"L{k}": 6 - k for k in range(1, 6)}
    (root / "dataset.json").write_text(json.dumps({"labels": {"background": 0, **values}}))
    return root / names[0], root / names[1]


@pytest.mark.parametrize("layout", ["spider", "nnunet_volumes"])
@pytest.mark.parametrize("axes", ["LIP", "RPS", "SPL"])
def test_a_mask_along_other_axes(tmp_path, layout, axes):
    image, labels = (np.where(values > 99, 0, values)[:, :24, :24] for values in spine(1))
    one_volume(layout, tmp_path, image, labels, "LPS", axes)
    other = r"is 24x24x5 but|is 5x24x24 but" if axes == "SPL" else f"is laid {axes} but its image .* LPS: store both"
    with pytest.raises(ValueError, match=other):
        read_all(layout, tmp_path)


def moved(volume: SimpleITK.Image) -> SimpleITK.Image:
    volume.SetOrigin([value + 3 for value in volume.GetOrigin()])
    return volume


def wider(volume: SimpleITK.Image) -> SimpleITK.Image:
    volume.SetSpacing([value * 1.5 for value in volume.GetSpacing()])
    return volume


def silent(volume: SimpleITK.Image) -> SimpleITK.Image:
    plain = SimpleITK.GetImageFromArray(SimpleITK.GetArrayFromImage(volume))
    plain.SetSpacing(volume.GetSpacing())
    return plain


@pytest.mark.parametrize("layout", ["spider", "nnunet_volumes"])
@pytest.mark.parametrize(
    ("change", "voxels"),
    [(moved, "10.4"), (wider, "31.2"), (lambda volume: wider(silent(volume)), "31.2"), (silent, None), (None, None)],
)
def test_a_mask_in_another_place_is_named(tmp_path, layout, change, voxels):
    image, labels = (np.where(values > 99, 0, values) for values in spine(1))
    _, mask = one_volume(layout, tmp_path, image, labels, "LPS", "LPS")
    if change:
        recast(change)(mask)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        items = find_items(get_task("lumbar_spine"), tmp_path)
    expected = [f"{mask} lies up to {voxels} voxels beside its image"] if voxels else []
    assert [str(warning.message)[: len(expected[0]) if expected else None] for warning in caught] == expected
    assert items[0].pixel_size is not None and items[0].read()[1].any()

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

from data.layouts import LAYOUTS, save, save_volume, spine, write_volumes
from segmentation.data.datamodule import find_items
from segmentation.tasks import get_task

Damage = Callable[[Path], None]


def rewritten(change: Callable[[bytes], bytes]) -> Damage:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def text(content: str, encoding: str = "utf-8") -> Damage:
    return lambda path: path.write_bytes(content.encode(encoding))


def edit(old: str, new: str) -> Damage:
    def damage(path: Path) -> None:
        content = path.read_text()
        assert old in content
        path.write_text(content.replace(old, new))

    return damage


def redrawn(change: Callable[[Image.Image], NDArray]) -> Damage:
    def damage(path: Path) -> None:
        with Image.open(path) as image:
            pixels = change(image)
        save(path, pixels.astype(np.uint8))

    return damage


def recast(change: Callable[[SimpleITK.Image], SimpleITK.Image]) -> Damage:
    return lambda path: SimpleITK.WriteImage(change(SimpleITK.ReadImage(str(path))), str(path), True)


def revalued(change: Callable[[NDArray], NDArray]) -> Damage:
    """Other voxels under the same header."""

    def damage(volume: SimpleITK.Image) -> SimpleITK.Image:
        changed = SimpleITK.GetImageFromArray(change(SimpleITK.GetArrayFromImage(volume)))
        changed.CopyInformation(volume)
        return changed

    return recast(damage)


def one_voxel(value: float) -> Damage:
    def change(voxels: NDArray) -> NDArray:
        voxels = voxels.astype(np.float32)
        voxels[2, 2, 2] = value
        return voxels

    return revalued(change)


def header_of_mha(line: str) -> Damage:
    def change(content: bytes) -> bytes:
        changed, count = re.subn(rb"%b = [^\n]*" % line.split()[0].encode(), line.encode(), content, count=1)
        assert count == 1
        return changed

    return rewritten(change)


def bit_rot(content: bytes) -> bytes:
    middle = (content.find(b"LOCAL") + len(content)) // 2
    return content[:middle] + bytes(30) + content[middle + 30 :]


def colours(image: Image.Image) -> NDArray:
    count = np.arange(image.width * image.height).reshape(image.height, image.width)
    return np.dstack([count % 97, count % 31, count % 2])


def short_header(content: bytes) -> bytes:
    """A PNG whose IHDR lacks its last byte, over which Pillow itself trips."""
    short = content[12:28]
    return content[:8] + struct.pack(">I", 12) + short + struct.pack(">I", zlib.crc32(short)) + content[33:]


def animated(path: Path) -> None:
    image = Image.open(path).convert("L")
    image.save(path, save_all=True, append_images=[image.rotate(90)])


def two_pages(path: Path) -> None:
    with Image.open(path) as image:
        image.save(path.with_suffix(".tif"), save_all=True, append_images=[image.copy()])
    path.unlink()


class Victim(NamedTuple):
    layout: str
    key: str  # what both names share
    image: str
    mask: str


ISIC, BUSI, HC18 = "ISIC-2017_Training", "Dataset_BUSI_with_GT", "training_set_pixel_size_and_HC.csv"
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
OF_FILES: dict[str, Damage] = {
    "cut": rewritten(lambda content: content[: len(content) // 2]),
    "cut_the_end": rewritten(lambda content: content[:-40]),
    "empty": text(""),
    "text": text("<!DOCTYPE html><title>404: this file has moved</title>\n" * 20),
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
HEADERS = (
    "NDims = x; DimSize = 24 40; DimSize = 24 40 50; ElementSpacing = 0 1 1; ElementType = MET_NONSENSE; "
    "TransformMatrix = 1 0 0 0 0 0 0 0 1; CompressedDataSize = 9"
)
OF_HEADERS = {line: header_of_mha(line) for line in HEADERS.split("; ")} | {"bit_rot": rewritten(bit_rot)}
CASES = [
    *((victim, "image", name) for victim in PICTURES for name in OF_PICTURES),
    *((victim, "mask", name) for victim in PICTURES for name in OF_MASKS),
    *((victim, "image", name) for victim in VOLUMES for name in OF_VOLUMES),
    *((victim, "mask", name) for victim in VOLUMES for name in OF_VOLUME_MASKS),
    *((VOLUMES[0], side, name) for side in ("image", "mask") for name in OF_HEADERS),
    (VOLUMES[0], "image", "not_a_number"),  # of NIfTI the reader itself makes zeros of such
]
CASES.remove((PICTURES[2], "mask", "grey_steps"))  # an outline is what is bright, whatever the value
DAMAGES = OF_MASKS | OF_VOLUME_MASKS | OF_HEADERS | {"not_a_number": one_voxel(float("nan"))}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every layout, undamaged."""
    root = tmp_path_factory.mktemp("layouts")
    for name, (_, write) in LAYOUTS.items():
        write(root / name)
        read_all(name, root / name)
    return root


def read_all(layout: str, root: Path, task: str = "") -> None:
    for item in find_items(get_task(task or LAYOUTS[layout][0]), root):
        item.read()


@pytest.mark.parametrize("case", CASES, ids=[f"{victim.layout}-{side}-{name}" for victim, side, name in CASES])
def test_damaged_files_are_named(written, tmp_path, case):
    (layout, key, *files), side, name = case
    shutil.copytree(written / layout, tmp_path / layout)
    path = tmp_path / layout / files[side == "mask"].format(key)
    DAMAGES[name](path)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read_all(layout, tmp_path / layout)
    assert (key if name == "delete" else str(path)) in str(caught.value)


def labels(**values: object) -> Damage:
    return text(json.dumps({"labels": {"background": 0, **values}}))


def change_mat(**arrays: np.ndarray | None) -> Damage:
    def damage(path: Path) -> None:
        content = {name: value for name, value in loadmat(path).items() if name[0] != "_"} | arrays
        savemat(path, {name: value for name, value in content.items() if value is not None})

    return damage


def copied(name: str) -> Damage:
    return lambda path: shutil.copy(path, path.with_name(name))


GT = (40, 24, 5)
FAULTS = [  # layout, file, damage, what the message says besides the path
    ("table", "items.csv", "empty", r"lacks the column\(s\) id, file, group: it begins with '',"),
    ("table", "items.csv", "zeros", "lacks the column|cannot be read as a table"),
    ("table", "items.csv", edit("id,file", "name,file"), r"lacks the column\(s\) id"),
    ("table", "items.csv", edit("group,split", "patient,split"), r"lacks the column\(s\) group"),
    ("table", "items.csv", text("id,file,group\n"), "lists no images"),
    ("table", "items.csv", edit("person_1", ""), "line 3: group is empty"),
    ("table", "items.csv", edit("1,1.png", "1,"), "line 3: file is empty"),
    ("table", "items.csv", edit("1,1.png", "1,9.png"), r"line 3: .*9\.png does not exist"),
    ("table", "items.csv", edit("0.25,101", "0.25,long"), "line 3: hc_mm is 'long'"),
    ("table", "items.csv", edit("0.25,101", "-0.25,101"), "line 3: resized_pixel_size_mm is '-0.25'"),
    ("table", "items.csv", edit("0.25,101", "inf,101"), "line 3: resized_pixel_size_mm is 'inf'"),
    ("table", "items.csv", text("id,file,group\n1,1.png,Jörg\n", "latin-1"), "cannot be read as a table"),
    ("table", "items.csv", text("id,file,group\n1,1.png,a\n", "utf-16"), "cannot be read as a table"),
    ("table", "items.csv", text('id,file,group\n1,"1.png,a\n'), "cannot be read as a table"),
    ("table", "items.csv", edit(",", ";"), r"lacks .* id, file, group: it begins with 'id;file;group;.*by commas"),
    ("hc18", HC18, edit(",", ";"), r"lacks .* filename, .*: it begins with 'filename;.*separated by commas"),
    ("hc18", HC18, "delete", "is missing: it gives the pixel sizes"),
    ("hc18", HC18, "empty", r"lacks the column\(s\) filename"),
    ("hc18", HC18, "text", r"lacks the column\(s\) filename"),
    ("hc18", HC18, edit("pixel size", "size"), r"lacks the column\(s\) pixel size"),
    ("hc18", HC18, edit("head circumference", "hc"), r"lacks the column\(s\) head circumference"),
    ("hc18", HC18, edit("010_HC.png,0.2", "010_HC.png,"), "line 3: pixel size is ''"),
    ("hc18", HC18, edit("010_HC.png,0.2", "010_HC.png,0"), "line 3: pixel size is '0'"),
    ("hc18", HC18, edit("010_HC.png,0.2,", "010_HC.png,0.2,?"), "line 3: head circumference is"),
    ("hc18", HC18, edit("010_HC.png", "011_HC.png"), r"has no row for .*010_HC\.png"),
    ("nnunet", "dataset.json", "delete", "cannot be read as JSON .*No such file"),
    *(("nnunet", "dataset.json", damage, "cannot be read as JSON") for damage in ("cut", "empty", "zeros")),
    ("nnunet", "dataset.json", text("[]"), "has no labels: it needs, for example"),
    ("nnunet", "dataset.json", text('{"labels": {}}'), "has no labels"),
    ("nnunet", "dataset.json", labels(a=1, ignore=2), "has an ignore label"),
    ("nnunet", "dataset.json", labels(a=[1, 2]), "regions are not supported"),
    ("nnunet", "dataset.json", labels(a="one"), "no whole numbers"),
    ("nnunet", "dataset.json", labels(a=1, b=2), "has the labels a, b: .*lesion"),
    ("nnunet", "splits_final.json", "cut", "cannot be read as JSON"),
    ("nnunet", "splits_final.json", text("[]"), "has no fold 0"),
    ("nnunet", "splits_final.json", text('[{"train": []}]'), "has no fold 0"),
    ("nnunet", "splits_final.json", edit("case_3", "case_9"), "case 'case_3' is in imagesTr, but not listed"),
    ("nnunet", "splits_final.json", edit('"case_0",', '"case_00", "case_0",'), "case 'case_00' is listed, but not in"),
    (
        "nnunet",
        "imagesTr/case_1_0001.png",
        lambda p: p.rename(p.with_name("case_1.png")),
        r"case_1\.png has no channel",
    ),
    ("nnunet", "imagesTr/case_1_0001.png", "delete", r"case_1_0002\.png is not channel 1 of its case"),
    ("nnunet", "imagesTr/case_1_0002.png", "delete", r"case_1_0001\.png is channel 2 of case 'case_1'.* takes 3"),
    *(("matlab", "01.mat", damage, "cannot be read as a MATLAB file") for damage in ("cut", "empty", "text")),
    ("matlab", "01.mat", "zeros", "cannot be read as a MATLAB file|lacks GT, I"),
    ("matlab", "01.mat", text("MATLAB 7.3 MAT-file".ljust(124) + "\0\2IM"), "cannot be read as a MATLAB file"),
    ("matlab", "01.mat", change_mat(I=None), "lacks I: it needs the image I and the mask GT"),
    ("matlab", "01.mat", change_mat(GT=None), "lacks GT: it needs"),
    ("matlab", "01.mat", change_mat(GT=np.ones((40, 24))), r"holds GT of the shape \(40, 24\)"),
    ("matlab", "01.mat", change_mat(GT=np.ones((40, 24, 9))), r"holds GT of the shape \(40, 24, 9\) for I of"),
    ("matlab", "01.mat", change_mat(GT=np.ones((40, 23, 5))), "both must be of one shape"),
    ("matlab", "01.mat", change_mat(GT=np.full(GT, 6)), "holds the value 6, but in GT"),
    ("matlab", "01.mat", change_mat(GT=np.full(GT, 0.5)), "holds fractions"),
    ("matlab", "01.mat", change_mat(GT=np.array("x")), "cannot|both must be|holds"),
    ("matlab", "01.mat", change_mat(I=np.full(GT, np.nan)), "holds values that are not finite"),
    ("isic2017", f"{ISIC}_Part1_GroundTruth", shutil.rmtree, f"{ISIC}_Data has no {ISIC}_Part1_GroundTruth beside it"),
    ("folders", "images/case0.png", rewritten(short_header), r"case0\.png cannot be read as an image"),
    ("folders", "images/case0.png", animated, r"case0\.png holds 2 images: save each in a file of its own"),
    ("folders", "images/case0.png", two_pages, r"case0\.tif holds 2 images: save each in a file of its own"),
    ("folders", "images/case1.png", copied("case1.jpg"), r"case1\.png and case1\.jpg both belong to 'case1': keep one"),
    ("folders", "masks/case1_mask.png", copied("case1.png"), r"case1_mask\.png and case1\.png both belong to 'case1'"),
    ("spider", "masks/1_t2.mha", revalued(lambda v: v[::-1]), "counts its vertebrae from the top, if the header of"),
]


@pytest.mark.parametrize(
    ("layout", "file", "damage", "message"), FAULTS, ids=[f"{fault[0]}-{k}" for k, fault in enumerate(FAULTS)]
)
def test_faults_are_told(written, tmp_path, layout, file, damage, message):
    shutil.copytree(written / layout, tmp_path / layout)
    path = tmp_path / layout / file
    OF_FILES.get(damage, damage)(path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        read_all(layout, tmp_path / layout)
    assert path.suffix == ".png" or path.is_dir() or path.name in str(caught.value)


ONE_CLASS, BONES = (
    "one class: task 'lumbar_spine' has 5",
    "a volume that numbers every bone: leave data.mask_threshold out",
)


@pytest.mark.parametrize(
    ("layout", "task", "threshold", "message"),
    [
        ("hc18", "lumbar_spine", None, f"holds outlines of heads, {ONE_CLASS}"),
        ("busi", "lumbar_spine", None, f"holds masks of lesions, {ONE_CLASS}"),
        ("spider", "isic2017", None, "a volume of the spine: task 'isic2017' is not one of lumbar_spine, spine_v"),
        ("matlab", "spine_structures", None, "task 'spine_structures' is not one of lumbar_spine, spine_vertebrae"),
        ("spider", "spine_vertebrae", 127, BONES),
        ("matlab", "spine_vertebrae", 127, BONES),
        ("class_folders", "lumbar_spine", None, "has the folders 0, 1, 2: task .* needs 0, 1, 2, 3, 4, for L1, L2"),
        ("nnunet", "breast_lesion", None, r"case_0_0002.png is channel 3 of case 'case_0': task .* takes 1"),
    ],
)
def test_tasks_that_a_data_set_does_not_serve(written, layout, task, threshold, message):
    with pytest.raises(ValueError, match=message):
        find_items(replace(get_task(task), mask_threshold=threshold), written / layout)


def test_volumes_that_hold_nothing_of_the_task(tmp_path):
    image, values = spine(1)
    save_volume(tmp_path / "images" / "1_t2.mha", image)
    save_volume(tmp_path / "masks" / "1_t2.mha", np.where(values > 99, values, 0))
    with pytest.raises(ValueError, match="holds no image with a label of task 'lumbar_spine'"):
        read_all("spider", tmp_path)


@pytest.mark.parametrize("layout", ["spider", "nnunet"])
@pytest.mark.parametrize("axes", ["LIP", "RPS", "SPL"])
def test_a_mask_along_other_axes(tmp_path, layout, axes):
    files = write_volumes(tmp_path, layout, 1, "LPS")
    for path, geometry in zip(files, ("LPS", axes), strict=True):  # of as many rows as columns
        voxels = spine(1, cut=False)[path == files[1]][:, :24, :24]
        save_volume(path, voxels, geometry)
    other = r"is 24x24x5 but|is 5x24x24 but" if axes == "SPL" else f"is laid {axes} but its image .* LPS: store both"
    with pytest.raises(ValueError, match=other):
        read_all("spider", tmp_path)


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


@pytest.mark.parametrize("layout", ["spider", "nnunet"])
@pytest.mark.parametrize(
    ("change", "voxels"),
    [(moved, "10.4"), (wider, "31.2"), (lambda volume: wider(silent(volume)), "31.2"), (silent, None), (None, None)],
)
def test_a_mask_in_another_place_is_named(tmp_path, layout, change, voxels):
    _, mask = write_volumes(tmp_path, layout, 1, "LPS")
    if change:
        recast(change)(mask)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        items = find_items(get_task("lumbar_spine"), tmp_path)
    expected = f"{mask} lies up to {voxels} voxels beside its image" if voxels else None
    assert [str(warning.message)[: len(expected or "")] for warning in caught] == [expected] * bool(expected)
    assert items[0].pixel_size is not None and items[0].read()[1].any()

"""Every layout that users bring: what was written is what is read, from made files and from files as downloaded."""

from __future__ import annotations

import csv
import importlib
import json
import pickle
import shutil
import sys
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import SimpleITK
import torch
from PIL import Image
from scipy.spatial.transform import Rotation

from data import layouts
from data.layouts import blob, grey, save, save_pairs, save_volume, spine
from segmentation.data.datamodule import SegmentationData, find_items
from segmentation.data.ellipse import head_circumference
from segmentation.data.formats import myosegmentum, spider, voxels
from segmentation.data.item import Item
from segmentation.prediction import predict_case, write_volume
from segmentation.tasks import TASKS, get_task

every_layout = pytest.mark.parametrize("layout", layouts.LAYOUTS)


def find(task: str, root: Path) -> dict[str, Item]:
    return {item.id: item for item in find_items(get_task(task), root)}


def check(found: dict[str, Item], written: dict[str, layouts.Truth]) -> None:
    assert list(found) == sorted(written)
    for key, truth in written.items():
        item = found[key]
        image, mask = pickle.loads(pickle.dumps(item)).read()  # as in another process
        assert (item.group, item.split) == (truth.group, truth.split), key
        assert item.pixel_size == pytest.approx(truth.pixel_size), key
        assert item.circumference == pytest.approx(truth.circumference), key
        assert item.files and all(path.is_file() for path in item.files)
        assert image.dtype == truth.image.dtype and mask.dtype == np.uint8
        assert np.array_equal(image, truth.image), key
        assert mask.shape == truth.mask.shape
        drawn = item.circumference is not None and item.files[1].stem.endswith("_Annotation")  # and fitted
        assert (mask != truth.mask).mean() <= (0.004 if drawn else 0), key


@every_layout
def test_what_is_written_is_read_whatever_lies_around_it(layout, tmp_path):
    task, written = layouts.write(layout, tmp_path / "archive" / "data set (1)")
    (tmp_path / "__MACOSX" / "images").mkdir(parents=True)
    (tmp_path / "archive" / "readme.txt").write_text("see the paper")
    check(find(task, tmp_path), written)
    for folder in [tmp_path, *(path for path in tmp_path.rglob("*") if path.is_dir())]:
        for path in [path for path in folder.iterdir() if path.is_file() and path.name[0] != "."]:
            (folder / f"._{path.name}").write_bytes(b"\0\5\26\7")
        (folder / "Thumbs.db").write_bytes(b"0")
        (folder / ".DS_Store").write_bytes(b"0")
    check(find(task, tmp_path / "archive" / "data set (1)"), written)


@pytest.mark.parametrize("layout", ["isic2017", "hc18", "nnunet", "folders", "sides", "spider"])
def test_doubled_folders(layout, tmp_path):
    task, written = layouts.write(layout, tmp_path)
    for folder in [path for path in tmp_path.rglob("*") if path.is_dir() and path.parent.parent != path]:
        if any(path.is_file() for path in folder.iterdir()):
            folder.rename(folder.with_name("moved"))
            folder.mkdir()
            folder.with_name("moved").rename(folder / folder.name)
    check(find(task, tmp_path), written)


def test_two_data_sets_in_one_folder_are_refused(tmp_path):
    layouts.write_folders(tmp_path / "one")
    layouts.write_busi(tmp_path / "other")
    with pytest.raises(ValueError, match=r"holds 2 data sets: give one of\n.*one\n.*Dataset_BUSI_with_GT"):
        find("breast_lesion", tmp_path)
    assert find("breast_lesion", tmp_path / "other")


def test_nothing_recognised_says_what_is(tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(ValueError, match="holds nothing that is understood") as caught:
        find("isic2017", tmp_path)
    words = "items.csv ISIC-2017_Training_Data training_set benign imagesTr SPIDER NN.mat masks/0/"
    assert all(word in str(caught.value) for word in words.split())


# Pictures.


def test_official_sides_are_followed_only_with_the_training_set(tmp_path):
    layouts.write("isic2017", tmp_path)
    shutil.rmtree(tmp_path / "ISIC-2017_Training_Data")
    assert {item.split for item in find("isic2017", tmp_path).values()} == {""}


def test_two_years_of_isic_in_one_folder_are_refused(tmp_path):
    for year in (2016, 2018):
        layouts.write_isic(tmp_path, year)
    with pytest.raises(ValueError, match="ISIC 2016 and 2018, which share images: give a folder of one year"):
        find("isic2017", tmp_path)


@pytest.mark.parametrize(("year", "sizes"), [(2016, [1, 1, 2]), (2017, [2, 2, 2])])
def test_sides_of_isic_reach_the_split_and_2016_gets_a_validation_set(tmp_path, year, sizes):
    written = layouts.write_isic(tmp_path, year)
    data = SegmentationData("isic2017", tmp_path, image_size=32, batch_size=1)
    data.setup("fit")
    assert [len(side) for side in (data.train_set, data.val_set, data.test_items)] == sizes
    assert {item.id for item in data.test_items} == {key for key, truth in written.items() if truth.split == "test"}


def test_hc18_table_may_lie_with_the_images_and_the_folder_of_the_images_is_enough(tmp_path):
    written, name = layouts.write_hc18(tmp_path), "training_set_pixel_size_and_HC.csv"
    check(find("fetal_head", tmp_path / "training_set"), written)
    (tmp_path / name).rename(tmp_path / "training_set" / name)
    check(find("fetal_head", tmp_path / "training_set"), written)


def test_titles_and_cells_of_a_table_need_no_care(tmp_path):
    written = layouts.write_table(tmp_path)
    table = tmp_path / "items.csv"
    head, *rows = table.read_text().splitlines()
    cells = "\n\n".join(row.replace(",", " , ") for row in rows)
    table.write_text(f"\n{head.upper().replace('HC_MM', 'hc_mm (mm) ')}\n{cells}\n,,\n", encoding="utf-8-sig")
    check(find("fetal_head", tmp_path), written)


@pytest.mark.parametrize("images", ["images", "imgs", "Image"])
@pytest.mark.parametrize("masks", ["masks", "labels", "Annotations", "GroundTruth", "ground_truth"])
def test_other_names_of_the_folders(tmp_path, images, masks):
    written = layouts.write_folders(tmp_path)
    (tmp_path / "images").rename(tmp_path / "i")
    (tmp_path / "masks").rename(tmp_path / masks)
    (tmp_path / "i").rename(tmp_path / images)
    check(find("breast_lesion", tmp_path), written)


@pytest.mark.parametrize("stored", [*product(["NFC", "NFD"], repeat=3)])
def test_names_with_accents_pair_however_they_are_stored(tmp_path, stored):
    image, mask, word = (unicodedata.normalize(form, "läsion2") for form in stored)
    for layout in ("folders", "table"):
        save(tmp_path / layout / "images" / f"{image}.png", grey(1))
        save(tmp_path / layout / "masks" / f"{mask}.png", blob(1))
        if layout == "table":
            (tmp_path / layout / "items.csv").write_text(f"id,file,group\n{word},{word}.png,a\n", encoding="utf-8")
        found = find("breast_lesion", tmp_path / layout)
        assert list(found) == ["läsion2"] and np.array_equal(found["läsion2"].read()[1], blob(1))


def test_an_image_may_be_called_like_a_mask_or_like_a_volume(tmp_path):
    pairs = {"a": "a", "a_mask": "a_mask", "k.nii": "k.nii_mask"}
    for k, (image, mask) in enumerate(pairs.items()):
        save(tmp_path / "images" / f"{image}.png", grey(k))
        save(tmp_path / "masks" / f"{mask}.png", blob(k))
    found = find("breast_lesion", tmp_path)
    assert all(np.array_equal(found[name].read()[1], blob(k)) for k, name in enumerate(pairs))


def test_one_class_folder_is_the_mask(tmp_path):
    layouts.write_class_folders(tmp_path)
    for number in (1, 2):
        shutil.rmtree(tmp_path / "masks" / str(number))
    assert np.array_equal(find("breast_lesion", tmp_path)["1"].read()[1], blob(10))


def test_nnunet_colours_in_one_file_and_labels_the_other_way_round(tmp_path):
    written = layouts.write_nnunet(tmp_path)
    for name, truth in written.items():
        for path in (tmp_path / "imagesTr").glob(f"{name}_000?.png"):
            path.unlink()
        save(tmp_path / "imagesTr" / f"{name}_0000.png", truth.image)
    (tmp_path / "dataset.json").write_text('{"labels": {"0": "background", "1": "lesion"}}')
    check(find("isic2017", tmp_path), written)


def test_nnunet_labels_of_other_names_follow_their_numbers(tmp_path):
    layouts.write_nnunet_volumes(tmp_path)
    (tmp_path / "dataset.json").write_text('{"labels": {"background": 0, "e": 5, "d": 4, "c": 3, "b": 2, "a": 1}}')
    stored = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(tmp_path / "labelsTr" / "s1.nii.gz")))
    assert np.array_equal(find("lumbar_spine", tmp_path)["s1_002"].read()[1], stored[2])


@pytest.mark.parametrize("names", [("Leber", "Tumor"), ("liver", "tumour")])
def test_nnunet_labels_of_other_names_follow_the_values_of_the_task(tmp_path, names):
    layouts.write_nnunet(tmp_path)
    table = {"background": 0} | dict(zip(names, (1, 2), strict=True))
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": table}))
    for path in (tmp_path / "labelsTr").iterdir():
        save(path, np.asarray(Image.open(path)) + np.uint8(1) * (grey(0) > 200))
    for item in find("rgb:tumour=2,liver=1", tmp_path).values():
        stored = np.asarray(Image.open(item.files[-1]))
        assert np.array_equal(item.read()[1], np.array([0, 2, 1])[stored])


def test_nnunet_labels_of_which_some_names_agree_are_refused(tmp_path):
    layouts.write_nnunet(tmp_path)
    (tmp_path / "dataset.json").write_text('{"labels": {"background": 0, "liver": 1, "tumor": 2}}')
    with pytest.raises(ValueError, match=r"has the labels liver, tumor: name those of task 'rgb:tumour,liver' alike"):
        find("rgb:tumour,liver", tmp_path)


@pytest.mark.parametrize("side", ["valid", "validation"])
def test_other_names_of_the_sides(tmp_path, side):
    layouts.write_sides(tmp_path)
    (tmp_path / "val").rename(tmp_path / side)
    assert {item.split for item in find("isic2017", tmp_path).values()} == {"train", "val", "test"}


def write_test_without_masks(root: Path) -> None:
    layouts.write_sides(root)
    shutil.rmtree(next(path for path in (root / "test").iterdir() if path.name != "images"))


def write_sides_beside_images(root: Path) -> None:
    save_pairs(root, [grey(0)], [grey(0)])
    save_pairs(root / "test", [grey(1)], [grey(1)])


def write_nested_images(root: Path) -> None:
    save_pairs(root, [grey(0)], [grey(0)])
    save(root / "images" / "patient9" / "1.png", grey(1))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_test_without_masks, r"test/images has no folder of masks beside it: add "),
        (write_sides_beside_images, r"has images of its own and others in test/: keep one of the two"),
        (write_nested_images, r"patient9 lies inside a folder of images, where none is looked for: move"),
    ],
)
def test_no_image_is_left_out_without_a_word(tmp_path, write, message):
    write(tmp_path)
    with pytest.raises(ValueError, match=message):
        find("isic2017", tmp_path)


def test_errors_in_a_table_name_their_line(tmp_path):
    save_pairs(tmp_path, [grey(k) for k in range(3)], [grey(k) for k in range(3)])
    (tmp_path / "items.csv").write_text("id,file,group,pixel_size_mm\n\n0,0.png,a,1\n\n\n1,1.png,b,none\n")
    with pytest.raises(ValueError, match=r"items\.csv line 6: .*is 'none'"):
        find("isic2017", tmp_path)


# Volumes.


def test_volumes_of_equal_spacings_are_cut_in_one_plane(tmp_path):
    """Their sizes alone would cut three across one axis and two across another."""
    for k, size in enumerate([(9, 30, 20), (9, 20, 30), (9, 30, 20), (30, 9, 20), (20, 9, 30)]):  # z y x
        values = np.random.default_rng(k).integers(1, 200, size).astype(np.uint8)
        for path, content in ((f"imagesTr/a{k}_0000.mha", values), (f"labelsTr/a{k}.mha", np.uint8(values > 100))):
            volume = SimpleITK.GetImageFromArray(content)
            volume.SetOrigin((1.0, 0.0, 0.0))
            (tmp_path / path).parent.mkdir(exist_ok=True)
            SimpleITK.WriteImage(volume, str(tmp_path / path))
    (tmp_path / "dataset.json").write_text('{"labels": {"background": 0, "lesion": 1}}')
    found = find("grey:lesion", tmp_path)
    assert {item.cut for item in found.values()} == {("LP", "")} and len(found) == 9 * 3 + 30 + 20
    for name in ("a0_004", "a3_017"):
        stored = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(found[name].files[0])))
        assert np.array_equal(found[name].read()[0][..., 0], stored[int(name[-3:])])


def check_spine(root: Path, order: tuple[int, ...] = (1, 2, 3)) -> None:
    """The three slices of `spine(1)` that show vertebrae, in the order of the file."""
    image, labels = spine(1)
    found = find("lumbar_spine", root)
    assert list(found) == ["1_t2_001", "1_t2_002", "1_t2_003"]
    for item, index in zip(found.values(), order, strict=True):
        pixels, mask = item.read()
        assert np.array_equal(pixels[..., 0], image[index])
        assert np.array_equal(mask, layouts.lumbar(labels[index]))
        assert item.pixel_size == pytest.approx((0.5, 0.8))


@pytest.mark.parametrize("geometry", ["LPS", "PIR", "RAS", "SRP", "PIL", "AIR", "LAS", "RSA", "ILP"])
@pytest.mark.parametrize("ending", ["mha", "nii.gz", "nii"])
def test_volumes_of_any_geometry_show_the_same_slices(tmp_path, geometry, ending):
    for folder, values in zip(("images", "masks"), spine(1), strict=True):
        save_volume(tmp_path / folder / f"1_t2.{ending}", values, geometry, packed=geometry != "LPS")
    check_spine(tmp_path, (3, 2, 1) if "R" in geometry else (1, 2, 3))


@pytest.mark.parametrize("seed", range(3))
def test_oblique_volumes_are_laid_by_their_nearest_axes(tmp_path, seed):
    tilt = Rotation.from_rotvec(0.3 * np.random.default_rng(seed).normal(size=3)).as_matrix()
    for folder, values in zip(("images", "masks"), spine(1), strict=True):
        path = tmp_path / folder / "1_t2.mha"
        save_volume(path, values, "LPS")
        volume = SimpleITK.ReadImage(str(path))
        volume.SetDirection((tilt @ np.reshape(volume.GetDirection(), (3, 3))).ravel().tolist())
        SimpleITK.WriteImage(volume, str(path))
    check_spine(tmp_path)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (1, 0, 2)])
def test_without_direction_the_vertebrae_tell_where_up_is(tmp_path, order, flip):
    """As NumPy users write volumes: the axes in any order in which rows come before columns, maybe upside down."""
    for folder, values in zip(("images", "masks"), spine(1), strict=True):
        (tmp_path / folder).mkdir()
        volume = SimpleITK.GetImageFromArray((values[:, ::-1] if flip else values).transpose(order).copy())
        volume.SetSpacing([(4.0, 0.5, 0.8)[axis] for axis in order[::-1]])
        SimpleITK.WriteImage(volume, str(tmp_path / folder / "1_t2.mha"))
    check_spine(tmp_path)


def of_training(data: SegmentationData, path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """A network that knows the slices of one training volume by heart, and finds nothing in others."""
    known = {image.tobytes(): mask for image, mask in (item.read() for item in data.items if path in item.files)}
    return lambda image: known.get(image.tobytes(), np.zeros(image.shape[:2], np.uint8))


def write_cut(root: Path, layout: str, geometry: str) -> tuple[Path, Path]:
    """Three volumes of one geometry, "silent" or silent and upside down ("over"); the last one's image and mask."""
    for k in (3, 2, 1):
        files = layouts.write_volumes(root, layout, k, None if geometry in ("silent", "over") else geometry, None)
        for path, values in zip(files, spine(k, cut=False), strict=True):
            if geometry == "over":
                save_volume(path, values[:, ::-1].copy(), None)
    return tuple(files)


@pytest.mark.parametrize("layout", ["spider", "nnunet"])
@pytest.mark.parametrize("geometry", ["LPS", "RAS", "PIR", "silent", "over"])
def test_volumes_are_predicted_in_the_slices_of_the_training(tmp_path, layout, geometry):
    files = write_cut(tmp_path, layout, geometry)
    trained, again = SegmentationData("lumbar_spine", tmp_path, image_size=32), SegmentationData("lumbar_spine")
    trained.setup("fit")
    torch.save(trained.state_dict(), tmp_path / "state.pt")
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    task, network = get_task("lumbar_spine"), of_training(trained, files[0])
    for axes in ("", *(() if geometry in ("silent", "over") else ("LPS", "SRP", "AIL"))):
        volumes = [SimpleITK.ReadImage(str(path)) for path in files]
        image, truth = (SimpleITK.DICOMOrient(volume, axes) if axes else volume for volume in volumes)
        SimpleITK.WriteImage(image, str(tmp_path / "new.mha"))
        found = predict_case([tmp_path / "new.mha"], task, network, again.cuts)
        assert np.array_equal(found.classes, layouts.lumbar(SimpleITK.GetArrayFromImage(truth))), axes
        write_volume(found, tmp_path / "found.mha")
        written = SimpleITK.ReadImage(str(tmp_path / "found.mha"))
        for name in ("Size", "Spacing", "Origin", "Direction"):
            assert getattr(written, f"Get{name}")() == pytest.approx(getattr(image, f"Get{name}")())


@pytest.mark.parametrize("cuts", [[("PI", "")], [("PI", "as stored"), ("PI", "turned over")]])
def test_a_volume_that_does_not_tell_how_it_lies_is_not_predicted(tmp_path, cuts):
    save_volume(tmp_path / "a.mha", spine(1)[0], None)
    found = predict_case([tmp_path / "a.mha"], get_task("lumbar_spine"), lambda image: image[..., 0], cuts)
    assert found.classes is None and "a.mha does not say how it lies (direction and origin)" in found.reason


def test_a_test_on_volumes_that_lie_otherwise_says_so(tmp_path):
    write_cut(tmp_path, "nnunet", "RAS")
    data = SegmentationData("lumbar_spine", tmp_path, side="all")
    data.load_state_dict({"cuts": [["PI", ""]]})
    with pytest.warns(UserWarning, match="rows point to AS are scored, but those of the training point to PI"):
        data.setup("test")


def test_classes_of_volumes_that_number_bones(tmp_path):
    layouts.write_spider(tmp_path / "spider", ("LPS",))
    labels = spine(1)[1][2]
    whole = ((labels > 0) & (labels < 26)) | ((labels > 100) & (labels < 126))
    assert np.array_equal(find("spine_vertebrae", tmp_path / "spider")["1_t2_002"].read()[1], whole)
    expected = whole + 2 * (labels == 100) + 3 * (labels > 200)
    assert np.array_equal(find("spine_structures", tmp_path / "spider")["1_t2_002"].read()[1], expected)
    written = layouts.write_matlab(tmp_path / "matlab")
    found = find("spine_vertebrae", tmp_path / "matlab")
    assert all(np.array_equal(found[key].read()[1], truth.mask > 0) for key, truth in written.items())
    for known in (spider.CLASSES, myosegmentum.CLASSES):
        assert all(tuple(classes) == TASKS[name].class_names for name, classes in known.items())


@pytest.mark.parametrize(
    ("dtype", "shift", "expected"),
    [(np.uint8, 0, np.uint8), (np.int16, 0, np.uint16), (np.int16, -1000, np.float32), (np.float32, 0.5, np.float32),
     (np.float64, -0.25, np.float32), (np.int32, 70000, np.float32)],
)  # fmt: skip
def test_voxels_keep_their_values(tmp_path, dtype, shift, expected):
    image, labels = (values % 200 for values in spine(1))
    save_volume(tmp_path / "images" / "1_t2.mha", (image.astype(np.float64) + shift).astype(dtype))
    save_volume(tmp_path / "masks" / "1_t2.mha", labels.astype(np.float32))
    pixels, _ = find("lumbar_spine", tmp_path)["1_t2_002"].read()
    assert pixels.dtype == expected
    assert np.array_equal(pixels[..., 0], image[2].astype(np.float64) + shift)


def test_channels_of_volumes_may_have_no_direction(tmp_path):
    """Of three the second is laid as it is stored."""
    image, _ = layouts.write_volumes(tmp_path, "nnunet", 1, "LPS")
    first = SimpleITK.ReadImage(str(image))
    second = SimpleITK.GetImageFromArray(SimpleITK.GetArrayFromImage(first) + 1)
    second.SetSpacing(first.GetSpacing())
    for number, volume in enumerate((first, second, first)):
        SimpleITK.WriteImage(volume, str(tmp_path / "imagesTr" / f"1_{number:04d}.mha"))
    pixels, _ = next(iter(find("rgb:a,b,c,d,e", tmp_path).values())).read()
    assert np.array_equal(pixels - pixels[..., :1], np.ones_like(pixels) * [0, 1, 0])


def test_channels_of_volumes_are_predicted_together(tmp_path):
    for k in (3, 2, 1):
        image, mask = layouts.write_volumes(tmp_path, "nnunet", k, "RAS")
        first = SimpleITK.ReadImage(str(image))
        for number in (1, 2):
            SimpleITK.WriteImage(first + number, str(tmp_path / "imagesTr" / f"{k}_{number:04d}.mha"))
    data = SegmentationData("rgb:a,b,c,d,e", tmp_path, image_size=32)
    data.setup("fit")
    again = SegmentationData("rgb:a,b,c,d,e")
    again.load_state_dict(data.state_dict())
    again.inputs = [tmp_path / "imagesTr"]
    cases, truth = again.predict_dataloader().dataset, SimpleITK.ReadImage(str(mask))
    assert [len(files) for files in cases] == [3, 3, 3]
    network = of_training(data, image)
    found = predict_case(cases[0], data.task, network, again.cuts, again.channel_files)
    assert np.array_equal(found.classes, SimpleITK.GetArrayFromImage(truth))
    SimpleITK.WriteImage(SimpleITK.DICOMOrient(first, "LPS"), str(tmp_path / "imagesTr" / "1_0002.mha"))
    assert "1_0002.mha is laid LPS but its image" in predict_case(cases[0], data.task, network, again.cuts).reason
    again.inputs = [image]
    [alone] = again.predict_dataloader().dataset
    found = predict_case(alone, data.task, network, again.cuts, again.channel_files)
    assert "1_0000.mha is one of 3 channels, as in the training: give all" in found.reason
    again.inputs = [image, image.with_name("1_0002.mha")]
    with pytest.raises(ValueError, match=r"1 has the channel\(s\) 1_0000\.mha, 1_0002\.mha: give 3 as in the training"):
        again.predict_dataloader()


def test_a_volume_is_read_once_for_all_its_slices_and_threads(tmp_path, monkeypatch):
    layouts.write_spider(tmp_path)
    found = find("lumbar_spine", tmp_path)
    opened, read = [], voxels.read_volume
    monkeypatch.setattr(voxels, "read_volume", lambda path: opened.append(path.parent.name) or read(path))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda item: item.read(), found.values()))
    assert sorted(opened) == ["images"] * 3 + ["masks"] * 3


@pytest.fixture
def datamodule(monkeypatch) -> ModuleType:
    """`datamodule` as it is imported where SimpleITK is not installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "segmentation"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    return importlib.import_module("segmentation.data.datamodule")


def test_images_need_no_simpleitk_and_what_does_names_it(datamodule, tmp_path):
    layouts.write_table(tmp_path / "table")
    [*items] = datamodule.find_items(get_task("fetal_head"), tmp_path / "table")
    assert [item.read()[1].sum() for item in items] == [blob(k).sum() for k in range(3)]
    layouts.save_deep(items[0].files[0], layouts.colours(0))
    readers = [items[0].read]
    for layout in ("spider", "nnunet_volumes"):
        task, _ = layouts.write(layout, tmp_path / layout)
        readers.append(partial(datamodule.find_items, get_task(task), tmp_path / layout))
    for read in readers:
        with pytest.raises(ImportError, match="need SimpleITK: python -m pip install SimpleITK"):
            read()


# Files as they are downloaded.


@pytest.fixture(scope="module")
def native(shared: Path) -> Path:
    folder = shared / "data" / "native"
    if not folder.is_dir():
        pytest.skip(f"no downloaded files at {folder}")
    return folder


@pytest.mark.parametrize(("task", "folder", "number"), [("isic2017", "isic2017", 9), ("breast_lesion", "busi", 8)])
def test_downloaded_pictures(native, task, folder, number):
    found = find(task, native / folder)
    assert len(found) == number
    for item in found.values():
        image, mask = item.read()
        drawn = [np.asarray(Image.open(path).convert("L")) > 0 for path in item.files[1:]]
        assert image.shape == (*mask.shape, get_task(task).in_channels) and image.dtype == np.uint8
        assert np.array_equal(mask, np.logical_or.reduce(drawn))
    assert (max(len(item.files) for item in found.values()) > 2) == (folder == "busi")  # one has several masks


def test_downloaded_hc18(native):
    found = find("fetal_head", native / "hc18")
    assert len(found) == 12 and len({item.group for item in found.values()}) == 9
    assert {found[key].group for key in ("014_HC", "014_2HC", "014_3HC")} == {"014"}
    with (native / "hc18" / "training_set_pixel_size_and_HC.csv").open() as stream:
        published = {row["filename"][:-4]: row for row in csv.DictReader(stream)}
    for key, item in found.items():
        image, mask = item.read()
        assert image.shape == (*mask.shape, 1)
        assert item.circumference == float(published[key]["head circumference (mm)"])
        assert head_circumference(mask, item.pixel_size) == pytest.approx(item.circumference, abs=0.05)
        outline = np.asarray(Image.open(native / "hc18" / "training_set" / f"{key}_Annotation.png")) > 0
        assert 0.3 < mask[outline].mean() < 0.7  # the edge of the mask runs along the middle of the line


def test_downloaded_volumes_in_both_orders(native):
    found = find("lumbar_spine", native / "lumbar_spine" / "spider_layout_converted")
    assert {item.group for item in found.values()} == {"1", "2", "3"}
    for item in found.values():
        image, mask = item.read()
        assert image.shape[0] == 381 and image.shape[1] < 200 and item.pixel_size == (1, 1)
        rows = [np.nonzero(mask == number)[0].mean() for number in np.unique(mask)[1:]]
        assert rows == sorted(rows)  # L1 above L5
    labels = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(found["3_t2_008"].files[1])))[8]
    assert np.array_equal(found["3_t2_008"].read()[1], layouts.lumbar(labels))
    for key in ("1_t2_008", "2_t2_009", "3_t2_008"):  # behind the vertebrae lies the canal, bright in T2 images
        image, mask = found[key].read()
        behind, before = [], []
        for row in np.flatnonzero(mask.any(axis=1)):
            columns = np.flatnonzero(mask[row])
            behind.append(image[row, columns[-1] + 4 : columns[-1] + 14].mean())
            before.append(image[row, columns[0] - 13 : columns[0] - 3].mean())
        assert np.mean(behind) > 1.4 * np.mean(before)


def test_downloaded_matlab_volumes_are_what_the_prepared_images_were_made_of(shared, native):
    found = find("lumbar_spine", native / "lumbar_spine" / "fastcleverseg")
    prepared = find("lumbar_spine", shared / "data" / "lumbar_spine").values()
    pairs = [item for item in prepared if item.group in ("sub16", "sub34")]
    assert len(pairs) == 18
    for item in pairs:
        raw = found[f"{item.group[3:]}_{int(item.id.split('_z')[1]):03d}"]
        assert all(np.array_equal(*pair) for pair in zip(raw.read(), item.read(), strict=True))


def test_prepared_tables(shared):
    path = shared / "data" / "hc18"
    if not path.is_dir():
        pytest.skip(f"no prepared images at {path}")
    found = find("fetal_head", path)
    first = found["000_HC"]
    assert (first.group, first.pixel_size, first.circumference) == ("000", (0.17284, 0.17284), 44.3)
    for item in list(found.values())[::40]:  # drawn with their outline, so up to half a pixel too large all round
        error = head_circumference(item.read()[1], item.pixel_size) - item.circumference
        assert abs(error) / (2 * np.pi) < 0.6 * item.pixel_size[0]

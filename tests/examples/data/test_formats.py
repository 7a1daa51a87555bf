"""Every layout that users bring: what was written is what is read, from made files and from files as downloaded."""

from __future__ import annotations

import csv
import itertools
import json
import pickle
import shutil
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch
from PIL import Image
from scipy.spatial.transform import Rotation

from data import layouts
from segmentation.data.datamodule import SegmentationData, find_items
from segmentation.data.ellipse import head_circumference
from segmentation.data.formats import myosegmentum, spider, voxels
from segmentation.data.item import Item
from segmentation.prediction import predict_file, write_volume
from segmentation.tasks import TASKS, get_task

every_layout = pytest.mark.parametrize("layout", layouts.LAYOUTS)


def write(layout: str, root: Path) -> tuple[str, dict[str, layouts.Truth]]:
    task, writer = layouts.LAYOUTS[layout]
    return task, writer(root)


def find(task: str, root: Path) -> dict[str, Item]:
    return {item.id: item for item in find_items(get_task(task), root)}


def check(found: dict[str, Item], written: dict[str, layouts.Truth], exact: bool = True) -> None:
    assert list(found) == sorted(written)
    for key, truth in written.items():
        item = found[key]
        image, mask = item.read()
        assert (item.group, item.split) == (truth.group, truth.split), key
        assert item.pixel_size == pytest.approx(truth.pixel_size), key
        assert item.circumference == pytest.approx(truth.circumference), key
        assert item.files and all(path.is_file() for path in item.files)
        assert image.dtype == truth.image.dtype and mask.dtype == np.uint8
        assert np.array_equal(image, truth.image), key
        assert mask.shape == truth.mask.shape
        assert (mask != truth.mask).mean() <= (0 if exact else 0.004), key


@every_layout
def test_what_is_written_is_read(layout, tmp_path):
    task, written = write(layout, tmp_path)
    check(find(task, tmp_path), written, exact=layout != "hc18")


@every_layout
def test_the_parent_of_an_unpacked_archive_is_enough(layout, tmp_path):
    task, written = write(layout, tmp_path / "archive" / "data set (1)")
    (tmp_path / "__MACOSX" / "images").mkdir(parents=True)
    (tmp_path / "archive" / "readme.txt").write_text("see the paper")
    check(find(task, tmp_path), written, exact=layout != "hc18")


@every_layout
def test_files_that_are_no_data_are_passed_over(layout, tmp_path):
    task, written = write(layout, tmp_path)
    for folder in [tmp_path, *(path for path in tmp_path.rglob("*") if path.is_dir())]:
        (folder / "Thumbs.db").write_bytes(b"0")
        (folder / ".DS_Store").write_bytes(b"0")
        for path in [path for path in folder.iterdir() if path.is_file() and path.name[0] != "."]:
            (folder / f"._{path.name}").write_bytes(b"\0\5\26\7")
    check(find(task, tmp_path), written, exact=layout != "hc18")


@every_layout
def test_items_can_be_sent_to_other_processes(layout, tmp_path):
    task, _ = write(layout, tmp_path)
    item = next(iter(find(task, tmp_path).values()))
    again = pickle.loads(pickle.dumps(item))
    assert all(np.array_equal(*pair) for pair in zip(item.read(), again.read(), strict=True))


@pytest.mark.parametrize("layout", ["isic2016", "isic2017", "isic2018", "hc18", "nnunet", "folders", "sides", "spider"])
def test_doubled_folders(layout, tmp_path):
    task, written = write(layout, tmp_path)
    for folder in [path for path in tmp_path.rglob("*") if path.is_dir() and path.parent.parent != path]:
        if any(path.is_file() for path in folder.iterdir()):
            folder.rename(folder.with_name("moved"))
            folder.mkdir()
            folder.with_name("moved").rename(folder / folder.name)
    check(find(task, tmp_path), written, exact=layout != "hc18")


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


def _save_deep(path: Path, pixels: np.ndarray) -> None:
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(pixels, isVector=pixels.ndim == 3), str(path))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("kind", "ending"),
    [("grey", "png"), ("grey", "JPG"), ("deep", "png"), ("deep", "TIF"), ("rgb", "bmp"), ("deep rgb", "PNG"),
     ("deep rgb", "tif"), ("rgba", "png"), ("palette", "png"), ("one bit", "png"), ("float", "tiff")],
)  # fmt: skip
def test_images_of_every_depth(tmp_path, kind, ending, channels):
    """One image of equal channels in ten ways: grey and colour tasks both get its values in the file's own depth."""
    folder, path = tmp_path / "images", tmp_path / "images" / f"a.{ending}"
    values = np.arange(np.prod(layouts.SIZE)).reshape(layouts.SIZE)
    values = {"one bit": values % 2 * 255, "grey": np.full(layouts.SIZE, 77)}.get(kind, values // 5)
    layouts.save(tmp_path / "masks" / "a.png", layouts.blob(1))
    folder.mkdir()
    if "deep" in kind:
        values = values * 250
        _save_deep(path, (np.dstack([values] * 3) if "rgb" in kind else values).astype(np.uint16))
    elif kind == "float":
        layouts.save(path, values.astype(np.float32) / 4)
    else:
        mode = {"rgb": "RGB", "rgba": "RGBA", "palette": "P", "one bit": "1"}.get(kind)
        layouts.save(path, values.astype(np.uint8), mode)
    image, mask = find("isic2017" if channels == 3 else "breast_lesion", tmp_path)["a"].read()
    assert image.shape == (*layouts.SIZE, channels)
    assert image.dtype == (np.float32 if kind == "float" else np.uint16 if "deep" in kind else np.uint8)
    assert np.array_equal(image, np.repeat(values[..., None] / (4 if kind == "float" else 1), channels, axis=2))
    assert np.array_equal(mask, layouts.blob(1))


def test_official_sides_are_followed_only_with_the_training_set(tmp_path):
    layouts.write_isic2017(tmp_path)
    shutil.rmtree(tmp_path / "ISIC-2017_Training_Data")
    assert {item.split for item in find("isic2017", tmp_path).values()} == {""}


def test_two_years_of_isic_in_one_folder_are_refused(tmp_path):
    layouts.write_isic2016(tmp_path)
    layouts.write_isic2018(tmp_path)
    with pytest.raises(ValueError, match="ISIC 2016 and 2018, which share images: give a folder with those of one"):
        find("isic2017", tmp_path)


def test_isic_2016_has_no_validation_set_and_gets_one(tmp_path):
    written = layouts.write_isic2016(tmp_path)
    data = SegmentationData("isic2017", tmp_path, image_size=32, batch_size=1)
    data.setup("fit")
    assert {item.id for item in data.test_items} == {key for key, truth in written.items() if truth.split == "test"}
    assert len(data.train_set) == len(data.val_set) == 1


def test_sides_of_data_sets_reach_the_split(tmp_path):
    layouts.write_isic2017(tmp_path)
    data = SegmentationData("isic2017", tmp_path, image_size=32, batch_size=2)
    data.setup("fit")
    assert [len(side) for side in (data.train_set, data.val_set, data.test_items)] == [2, 2, 2]


def test_hc18_table_may_lie_with_the_images_and_the_folder_of_the_images_is_enough(tmp_path):
    written = layouts.write_hc18(tmp_path)
    check(find("fetal_head", tmp_path / "training_set"), written, exact=False)
    name = "training_set_pixel_size_and_HC.csv"
    (tmp_path / name).rename(tmp_path / "training_set" / name)
    check(find("fetal_head", tmp_path / "training_set"), written, exact=False)


@pytest.mark.parametrize("geometry", ["LPS", "PIR", "RAS", "SRP", "PIL", "AIR", "LAS", "RSA", "ILP"])
@pytest.mark.parametrize("ending", ["mha", "nii.gz", "nii"])
def test_volumes_of_any_geometry_show_the_same_slices(tmp_path, geometry, ending):
    image, labels = layouts.spine(1)
    layouts.save_volume(tmp_path / "images" / f"1_t2.{ending}", image, geometry)
    layouts.save_volume(tmp_path / "masks" / f"1_t2.{ending}", labels, geometry)
    found = find("lumbar_spine", tmp_path)
    assert list(found) == ["1_t2_001", "1_t2_002", "1_t2_003"]
    order = (3, 2, 1) if "R" in geometry else (1, 2, 3)
    for item, index in zip(found.values(), order, strict=True):
        pixels, mask = item.read()
        assert np.array_equal(pixels[..., 0], image[index])
        assert np.array_equal(mask, layouts.lumbar(labels[index]))
        assert item.pixel_size == pytest.approx((0.5, 0.8))


@pytest.mark.parametrize("seed", range(5))
def test_oblique_volumes_are_laid_by_their_nearest_axes(tmp_path, seed):
    image, labels = layouts.spine(1)
    tilt = Rotation.from_rotvec(0.3 * np.random.default_rng(seed).normal(size=3)).as_matrix()
    for folder, values in (("images", image), ("masks", labels)):
        path = tmp_path / folder / "1_t2.mha"
        layouts.save_volume(path, values, "LPS")
        volume = SimpleITK.ReadImage(str(path))
        volume.SetDirection((tilt @ np.reshape(volume.GetDirection(), (3, 3))).ravel().tolist())
        SimpleITK.WriteImage(volume, str(path))
    for item, index in zip(find("lumbar_spine", tmp_path).values(), (1, 2, 3), strict=True):
        assert np.array_equal(item.read()[0][..., 0], image[index])


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (1, 0, 2)])
def test_without_direction_the_vertebrae_tell_where_up_is(tmp_path, order, flip):
    """As NumPy users write volumes: the axes in any order in which rows come before columns, maybe upside down."""
    image, labels = layouts.spine(1)
    for folder, values in (("images", image), ("masks", labels)):
        (tmp_path / folder).mkdir()
        stored = (values[:, ::-1] if flip else values).transpose(order)
        volume = SimpleITK.GetImageFromArray(stored.copy())
        volume.SetSpacing([(4.0, 0.5, 0.8)[axis] for axis in order[::-1]])
        SimpleITK.WriteImage(volume, str(tmp_path / folder / "1_t2.mha"))
    found = find("lumbar_spine", tmp_path)
    assert list(found) == ["1_t2_001", "1_t2_002", "1_t2_003"]
    for item, index in zip(found.values(), (1, 2, 3), strict=True):
        pixels, mask = item.read()
        assert np.array_equal(pixels[..., 0], image[index])
        assert np.array_equal(mask, layouts.lumbar(labels[index]))
        assert item.pixel_size == (0.5, 0.8)


def of_training(data: SegmentationData, path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """A network that knows the slices of one training volume by heart, and finds nothing in others."""
    pairs = [item.read() for item in data.items if path in item.files]
    known = {image.tobytes(): mask for image, mask in pairs}
    return lambda image: known.get(image.tobytes(), np.zeros(image.shape[:2], np.uint8))


def write_cut(root: Path, layout: str, geometry: str) -> None:
    """Three volumes of one geometry, "silent" or silent and upside down ("over")."""
    for k in (1, 2, 3):
        files = {"images": f"{k}_t2.mha", "masks": f"{k}_t2.mha"}
        if layout == "nnunet":
            files = {"imagesTr": f"{k}_0000.mha", "labelsTr": f"{k}.mha"}
        image, labels = layouts.spine(k)
        labels = np.where(labels > 99, 0, labels)
        for (folder, name), values in zip(files.items(), (image, labels), strict=True):
            stored = values[:, ::-1].copy() if geometry == "over" else values
            layouts.save_volume(root / folder / name, stored, None if geometry in ("silent", "over") else geometry)
    names = {f"L{k}": 6 - k for k in range(1, 6)}
    (root / "dataset.json").write_text(json.dumps({"labels": {"background": 0, **names}}))


@pytest.mark.parametrize("layout", ["spider", "nnunet"])
@pytest.mark.parametrize("geometry", ["LPS", "RAS", "PIR", "silent", "over"])
def test_volumes_are_predicted_in_the_slices_of_the_training(tmp_path, layout, geometry):
    write_cut(tmp_path, layout, geometry)
    trained, again = SegmentationData("lumbar_spine", tmp_path, image_size=32), SegmentationData("lumbar_spine")
    trained.setup("fit")
    again.load_state_dict(torch.load(_saved(trained.state_dict(), tmp_path), weights_only=True))
    folders = ("images", "masks", "{}_t2.mha", "{}_t2.mha")
    if layout == "nnunet":
        folders = ("imagesTr", "labelsTr", "{}_0000.mha", "{}.mha")
    path, mask = (tmp_path / folder / name.format(1) for folder, name in zip(folders[:2], folders[2:], strict=True))
    truth = SimpleITK.ReadImage(str(mask))
    task, network = get_task("lumbar_spine"), of_training(trained, path)
    for axes in ("", *(() if geometry in ("silent", "over") else ("LPS", "SRP", "AIL"))):
        volume = SimpleITK.ReadImage(str(path))
        turned = [SimpleITK.DICOMOrient(one, axes) if axes else one for one in (volume, truth)]
        SimpleITK.WriteImage(turned[0], str(tmp_path / "new.mha"))
        found = predict_file(tmp_path / "new.mha", task, network, again.cuts)
        assert np.array_equal(found.classes, layouts.lumbar(SimpleITK.GetArrayFromImage(turned[1]))), axes
        write_volume(found, tmp_path / "found.mha")
        written = SimpleITK.ReadImage(str(tmp_path / "found.mha"))
        for name in ("Size", "Spacing", "Origin", "Direction"):
            assert getattr(written, f"Get{name}")() == pytest.approx(getattr(turned[0], f"Get{name}")())


def _saved(content: object, folder: Path) -> Path:
    torch.save(content, folder / "state.pt")
    return folder / "state.pt"


@pytest.mark.parametrize("cuts", [(), [("PI", "")], [("PI", "as stored"), ("PI", "turned over")]])
def test_a_volume_that_does_not_tell_how_it_lies_is_not_predicted(tmp_path, cuts):
    layouts.save_volume(tmp_path / "a.mha", layouts.spine(1)[0], None)
    found = predict_file(tmp_path / "a.mha", get_task("lumbar_spine"), lambda image: image[..., 0], cuts)
    assert found.classes is None and "a.mha does not say how it lies (direction and origin)" in found.reason


def test_a_test_on_volumes_that_lie_otherwise_says_so(tmp_path):
    write_cut(tmp_path, "nnunet", "RAS")
    data = SegmentationData("lumbar_spine", tmp_path, side="all")
    data.load_state_dict({"cuts": [["PI", ""]]})
    with pytest.warns(
        UserWarning, match="columns and rows point to AS are scored, but those of the training point to PI"
    ):
        data.setup("test")


@pytest.mark.parametrize("images", ["images", "imgs", "Image"])
@pytest.mark.parametrize("masks", ["masks", "labels", "Annotations", "GroundTruth", "ground_truth"])
def test_other_names_of_the_folders(tmp_path, images, masks):
    written = layouts.write_folders(tmp_path)
    (tmp_path / "images").rename(tmp_path / "i")
    (tmp_path / "masks").rename(tmp_path / masks)
    (tmp_path / "i").rename(tmp_path / images)
    check(find("breast_lesion", tmp_path), written)


@pytest.mark.parametrize("stored", itertools.product(["NFC", "NFD"], repeat=3))
def test_names_with_accents_pair_however_they_are_stored(tmp_path, stored):
    image, mask, word = (unicodedata.normalize(form, "läsion2") for form in stored)
    for layout in ("folders", "table"):
        layouts.save(tmp_path / layout / "images" / f"{image}.png", layouts.grey(1))
        layouts.save(tmp_path / layout / "masks" / f"{mask}.png", layouts.blob(1))
        if layout == "table":
            (tmp_path / layout / "items.csv").write_text(f"id,file,group\n{word},{word}.png,a\n", encoding="utf-8")
        found = find("breast_lesion", tmp_path / layout)
        assert list(found) == ["läsion2"] and np.array_equal(found["läsion2"].read()[1], layouts.blob(1))


def test_names_with_nii_inside_pair(tmp_path):
    layouts.save(tmp_path / "images" / "k11.nii.png", layouts.grey(1))
    layouts.save(tmp_path / "masks" / "k11.nii_mask.png", layouts.blob(1))
    assert list(find("breast_lesion", tmp_path)) == ["k11.nii"]


def test_classes_of_spider(tmp_path):
    layouts.write_spider(tmp_path, ("LPS",))
    labels = layouts.spine(1)[1][2]
    whole = ((labels > 0) & (labels < 26)) | ((labels > 100) & (labels < 126))
    assert np.array_equal(find("spine_vertebrae", tmp_path)["1_t2_002"].read()[1], whole)
    expected = whole + 2 * (labels == 100) + 3 * (labels > 200)
    assert np.array_equal(find("spine_structures", tmp_path)["1_t2_002"].read()[1], expected)
    assert all(tuple(classes) == TASKS[name].class_names for name, classes in spider.CLASSES.items())
    assert all(tuple(classes) == TASKS[name].class_names for name, classes in myosegmentum.CLASSES.items())


@pytest.mark.parametrize(
    ("dtype", "shift", "expected"),
    [(np.uint8, 0, np.uint8), (np.int16, 0, np.uint16), (np.int16, -1000, np.float32), (np.float32, 0.5, np.float32),
     (np.float64, -0.25, np.float32), (np.int32, 70000, np.float32)],
)  # fmt: skip
def test_voxels_keep_their_values(tmp_path, dtype, shift, expected):
    image, labels = (values % 200 for values in layouts.spine(1))
    layouts.save_volume(tmp_path / "images" / "1_t2.mha", (image.astype(np.float64) + shift).astype(dtype))
    layouts.save_volume(tmp_path / "masks" / "1_t2.mha", labels.astype(np.float32))
    pixels, _ = find("lumbar_spine", tmp_path)["1_t2_002"].read()
    assert pixels.dtype == expected
    assert np.array_equal(pixels[..., 0], image[2].astype(np.float64) + shift)


def test_a_volume_is_read_once_for_all_its_slices_and_threads(tmp_path, monkeypatch):
    layouts.write_spider(tmp_path)
    found = find("lumbar_spine", tmp_path)
    opened = []
    read = voxels.read_volume
    monkeypatch.setattr(voxels, "read_volume", lambda path: opened.append(path.parent.name) or read(path))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda item: item.read(), found.values()))
    assert sorted(opened) == ["images"] * 3 + ["masks"] * 3


def test_all_vertebrae_of_matlab_volumes_as_one_class(tmp_path):
    written = layouts.write_matlab(tmp_path)
    found = find("spine_vertebrae", tmp_path)
    assert all(np.array_equal(found[key].read()[1], truth.mask > 0) for key, truth in written.items())


def test_nnunet_colours_in_one_file_and_labels_the_other_way_round(tmp_path):
    written = layouts.write_nnunet(tmp_path)
    for name, truth in written.items():
        for path in (tmp_path / "imagesTr").glob(f"{name}_000?.png"):
            path.unlink()
        layouts.save(tmp_path / "imagesTr" / f"{name}_0000.png", truth.image)
    (tmp_path / "dataset.json").write_text('{"labels": {"0": "background", "1": "lesion"}}')
    check(find("isic2017", tmp_path), written)


def test_nnunet_labels_of_other_names_follow_their_numbers(tmp_path):
    layouts.write_nnunet_volumes(tmp_path)
    (tmp_path / "dataset.json").write_text('{"labels": {"background": 0, "e": 5, "d": 4, "c": 3, "b": 2, "a": 1}}')
    stored = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(tmp_path / "labelsTr" / "s1.nii.gz")))
    assert np.array_equal(find("lumbar_spine", tmp_path)["s1_002"].read()[1], stored[2])


def test_one_class_folder_is_the_mask(tmp_path):
    layouts.write_class_folders(tmp_path)
    for number in (1, 2):
        shutil.rmtree(tmp_path / "masks" / str(number))
    assert np.array_equal(find("breast_lesion", tmp_path)["1"].read()[1], layouts.blob(10))


def test_an_image_may_be_called_like_a_mask(tmp_path):
    for name in ("a", "a_mask"):
        layouts.save(tmp_path / "images" / f"{name}.png", layouts.grey(1))
    layouts.save(tmp_path / "masks" / "a.png", layouts.blob(1))
    layouts.save(tmp_path / "masks" / "a_mask.png", layouts.blob(2))
    found = find("breast_lesion", tmp_path)
    assert np.array_equal(found["a_mask"].read()[1], layouts.blob(2))


# Files as they are downloaded.


@pytest.fixture(scope="module")
def native(shared: Path) -> Path:
    folder = shared / "data" / "native"
    if not folder.is_dir():
        pytest.skip(f"no downloaded files at {folder}")
    return folder


def test_downloaded_isic2017(native):
    found = find("isic2017", native / "isic2017")
    assert len(found) == len(list(native.glob("isic2017/*_Data/*.jpg"))) == 9
    for key, item in found.items():
        image, mask = item.read()
        folder = native / "isic2017" / "ISIC-2017_Validation_Part1_GroundTruth"
        assert image.shape == (*mask.shape, 3) and image.dtype == np.uint8
        assert np.array_equal(mask * 255, np.asarray(Image.open(folder / f"{key}_segmentation.png")))


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


def test_downloaded_busi(native):
    found = find("breast_lesion", native / "busi")
    assert len(found) == 8
    two = [native / "busi" / "Dataset_BUSI_with_GT" / "benign" / f"benign (4)_mask{part}.png" for part in ("", "_1")]
    masks = [np.asarray(Image.open(path).convert("L")) > 0 for path in two]
    assert masks[0].any() and masks[1].any()
    assert np.array_equal(found["benign (4)"].read()[1], masks[0] | masks[1])
    assert not found["normal (1)"].read()[1].any()


def test_downloaded_volumes_in_both_orders(native):
    found = find("lumbar_spine", native / "lumbar_spine" / "spider_layout_converted")
    assert {item.group for item in found.values()} == {"1", "2", "3"}
    for item in found.values():
        image, mask = item.read()
        assert image.shape[0] == 381 and image.shape[1] < 200 and item.pixel_size == (1, 1)
        rows = [np.nonzero(mask == number)[0].mean() for number in np.unique(mask)[1:]]
        assert rows == sorted(rows)  # L1 above L5
    middle = found["3_t2_008"].read()
    labels = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(found["3_t2_008"].files[1])))[8]
    assert np.array_equal(middle[1], layouts.lumbar(labels))
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
    pairs = {
        f"{item.group[3:]}_{int(item.id.split('_z')[1]):03d}": item
        for item in prepared
        if item.group in ("sub16", "sub34")
    }
    assert len(pairs) == 18
    for key, item in pairs.items():
        assert all(np.array_equal(*pair) for pair in zip(found[key].read(), item.read(), strict=True))


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

"""Small data sets written in every layout that users bring, with what reading them has to give."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat

from segmentation.data.ellipse import Ellipse

SIZE = (30, 40)  # h w


@dataclass
class Truth:
    """What one item has to be."""

    group: str
    image: NDArray  # h w c
    mask: NDArray  # h w
    split: str = ""
    pixel_size: tuple[float, float] | None = None
    circumference: float | None = None


Written = dict[str, Truth]


def grey(seed: int, size: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    """Any image (h w)."""
    return np.random.default_rng(seed).integers(0, 256, size).astype(np.uint8)


def blob(seed: int, size: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    """A mask (h w) of 0 and 1."""
    rng = np.random.default_rng(seed)
    ellipse = Ellipse(*rng.uniform(10, 20, 2), *sorted(rng.uniform(4, 9, 2))[::-1], rng.uniform(0, 3))
    return ellipse.fill(size).astype(np.uint8)


def save(path: Path, pixels: NDArray, mode: str | None = None) -> None:
    """Write a picture; folders are made as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path)


def save_volume(path: Path, voxels: NDArray, geometry: str | None = "LPS", packed: bool = True) -> None:
    """Write voxels given as (slices from right to left, rows from head to foot, columns from front to back).

    Voxels are 4 mm thick, 0.5 mm high and 0.8 mm wide. `geometry` is the order of the axes in the file; without one
    the file is written as it lies in memory and its header tells of no direction.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(voxels)
    image.SetSpacing((0.8, 0.5, 4.0))
    if geometry:
        image.SetDirection((0, 0, 1, 1, 0, 0, 0, -1, 0))  # PIL
        image.SetOrigin((-30.0, 12.0, 7.0))
        image = SimpleITK.DICOMOrient(image, geometry)
    SimpleITK.WriteImage(image, str(path), packed)


def spine(patient: int) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Voxels (5 40 24) and SPIDER's labels: L5 ... L1, a cut vertebra, the canal behind them, discs between them."""
    image = np.random.default_rng(patient).integers(0, 900, (5, 40, 24)).astype(np.int16)
    labels = np.zeros(image.shape, np.uint8)
    for number in range(1, 7):  # from the bottom
        bottom = 40 - 6 * number
        labels[1:4, bottom : bottom + 4, 5:12] = number if number < 6 else 106
        labels[1:4, bottom + 4 : bottom + 6, 5:12] = 200 + number
    labels[2:4, :, 15:18] = 100
    return image, labels


def lumbar(labels: NDArray) -> NDArray[np.uint8]:
    """Classes L1 ... L5 of SPIDER's labels."""
    return np.where((labels > 0) & (labels < 6), 6 - labels, 0).astype(np.uint8)


def write_table(root: Path) -> Written:
    """images/, masks/, items.csv."""
    rows, written = ["id,file,group,split,pixel_size_mm,resized_pixel_size_mm,hc_mm"], {}
    for k, split in enumerate(("train", "val", "test")):
        save(root / "images" / f"{k}.png", grey(k))
        save(root / "masks" / f"{k}.png", blob(k) * 255)
        rows.append(f"{k},{k}.png,person_{k},{split},0.1,0.25,{100 + k}")
        written[str(k)] = Truth(f"person_{k}", grey(k)[..., None], blob(k), split, (0.25, 0.25), 100 + k)
    (root / "items.csv").write_text("\n".join(rows) + "\n")
    return written


def write_isic(root: Path, images: str, masks: str, sides: dict[str, str]) -> Written:
    """All sets of one year, with superpixels, and one name each in capitals."""
    written = {}
    for k, (name, split) in enumerate(sides.items()):
        for number in (2 * k, 2 * k + 1):
            key, image = f"ISIC_{number:07d}", np.dstack([grey(number + c) for c in (0, 10, 20)])
            save(root / images.format(name) / (f"{key}.png" if number % 2 else f"{key}.PNG"), image)
            save(root / images.format(name) / f"{key}_superpixels.png", image)
            ending = "_segmentation.png" if number % 2 else "_Segmentation.PNG"
            save(root / masks.format(name) / f"{key}{ending}", blob(number) * 255)
            written[key] = Truth(key, image, blob(number), split)
    return written


write_isic2016, write_isic2017, write_isic2018 = (
    partial(write_isic, images=images, masks=masks, sides=dict(zip(sets.split(), sides.split(), strict=True)))
    for images, masks, sets, sides in (
        ("ISBI2016_ISIC_Part1_{}_Data", "ISBI2016_ISIC_Part1_{}_GroundTruth", "Training Test", "train test"),
        ("ISIC-2017_{}_Data", "ISIC-2017_{}_Part1_GroundTruth", "Training Validation Test_v2", "train val test"),
        ("ISIC2018_Task1-2_{}_Input", "ISIC2018_Task1_{}_GroundTruth", "Training Validation Test", "train val test"),
    )
)


def write_hc18(root: Path) -> Written:
    """Closed outlines, and one of a head that leaves the frame; a test set without annotations."""
    rows, written = ["filename,pixel size(mm) ,head circumference (mm) "], {}
    heads = {
        "000_HC": Ellipse(45, 60, 35, 28, 0.4),
        "010_HC": Ellipse(40, 50, 30, 25, 1.2),
        "010_2HC": Ellipse(42, 90, 48, 35, 2.2),  # 120 columns: cut off at the right
    }
    for k, (name, head) in enumerate(heads.items()):
        rows_, columns = np.indices((90, 120))
        line = np.abs(head.radii(rows_, columns) - 1) * head.b < 0.8
        save(root / "training_set" / f"{name}.png", grey(k, (90, 120)))
        save(root / "training_set" / f"{name}_Annotation.png", line * np.uint8(255))
        length = head.circumference() * 0.2
        rows.append(f"{name}.png,0.2,{length}")
        mask = head.fill((90, 120)).astype(np.uint8)
        written[name] = Truth(name[:3], grey(k, (90, 120))[..., None], mask, "", (0.2, 0.2), length)
    save(root / "test_set" / "000_HC.png", grey(9, (90, 120)))
    (root / "training_set_pixel_size_and_HC.csv").write_text("\n".join(rows) + "\n")
    (root / "test_set_pixel_size.csv").write_text("filename,pixel size(mm)\n000_HC.png,0.2\n")
    return written


def write_busi(root: Path) -> Written:
    """One to three masks per image, of one bit, RGB and RGBA; a normal image with an empty mask."""
    place, written = root / "Dataset_BUSI_with_GT", {}
    for k, modes in enumerate((["1"], ["1", "RGBA"], ["L", "RGB", "1"])):
        name = f"benign ({k})" if k < 2 else f"malignant ({k})"
        save(place / name.split()[0] / f"{name}.png", grey(k), "RGB")
        for number, mode in enumerate(modes):
            ending = f"_{number}" if number else ""
            save(place / name.split()[0] / f"{name}_mask{ending}.png", blob(10 * k + number) * 255, mode)
        masks = [blob(10 * k + number) for number in range(len(modes))]
        written[name] = Truth(name, grey(k)[..., None], np.maximum.reduce(masks))
    save(place / "normal" / "normal (1).png", grey(7), "RGB")
    save(place / "normal" / "normal (1)_mask.png", np.zeros(SIZE, np.uint8), "RGB")
    return written | {"normal (1)": Truth("normal (1)", grey(7)[..., None], np.zeros(SIZE, np.uint8))}


def write_spider(
    root: Path, geometries: tuple[str | None, ...] = ("LPS", "PIR", "RAS"), packed: bool = True
) -> Written:
    """A volume for each geometry; slice numbers are those of the file."""
    written = {}
    for k, geometry in enumerate(geometries, start=1):
        image, labels = spine(k)
        save_volume(root / "images" / f"{k}_t2.mha", image, geometry, packed)
        save_volume(root / "masks" / f"{k}_t2.mha", labels, geometry, packed)
        for index in (1, 2, 3):
            number = 4 - index if geometry and "R" in geometry else index
            pixels = image[index].astype(np.uint16)[..., None]
            written[f"{k}_t2_{number:03d}"] = Truth(str(k), pixels, lumbar(labels[index]), "", (0.5, 0.8))
    return written


def write_matlab(root: Path) -> Written:
    """Two volumes, one with a slice of GT too many."""
    root.mkdir(parents=True, exist_ok=True)
    written = {}
    for k in (1, 2):
        image, labels = np.random.default_rng(k).integers(0, 256, (5, 40, 24)).astype(np.uint8), lumbar(spine(k)[1])
        mask = np.concatenate([labels, labels[:1]])[: 4 + k]
        savemat(root / f"0{k}.mat", {"I": image.transpose(1, 2, 0), "GT": mask.transpose(1, 2, 0)})
        for index in (1, 2, 3):
            written[f"0{k}_{index:03d}"] = Truth(f"0{k}", image[index][..., None], labels[index])
    return written


def write_nnunet(root: Path) -> Written:
    """Three flat files per case, one for each channel, and fold 0."""
    written = {}
    for k in range(4):
        image = np.dstack([grey(10 * k + c) for c in range(3)])
        for c in range(3):
            save(root / "imagesTr" / f"case_{k}_{c:04d}.png", image[..., c])
        save(root / "labelsTr" / f"case_{k}.png", blob(k))
        written[f"case_{k}"] = Truth(f"case_{k}", image, blob(k), "val" if k == 3 else "train")
    (root / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "melanoma": 1}, "file_ending": ".png"}))
    fold = {"train": ["case_0", "case_1", "case_2"], "val": ["case_3"]}
    (root / "splits_final.json").write_text(
        json.dumps([fold, {"train": ["case_3"], "val": ["case_0", "case_1", "case_2"]}])
    )
    return written


def write_nnunet_volumes(root: Path) -> Written:
    """Volumes whose label names are those of the task, in another order; slices lie across the largest spacing."""
    written, values = {}, {"background": 0, "L5": 1, "L1": 2, "L2": 3, "L3": 4, "L4": 5}
    for k in (1, 2):
        image, labels = spine(k)
        classes = lumbar(labels)
        stored = np.array([0, 2, 3, 4, 5, 1], np.uint8)[classes]
        save_volume(root / "imagesTr" / f"s{k}_0000.nii.gz", image, None)
        save_volume(root / "labelsTr" / f"s{k}.nii.gz", stored, None)
        for index in (1, 2, 3):
            pixels = image[index].astype(np.uint16)[..., None]
            written[f"s{k}_{index:03d}"] = Truth(f"s{k}", pixels, classes[index], "", (0.5, 0.8))
    (root / "dataset.json").write_text(json.dumps({"labels": values}))
    return written


def write_folders(root: Path) -> Written:
    """images/ and masks/; all the endings that the names of masks have."""
    written = {}
    for k, ending in enumerate((".png", "_mask.png", "_segmentation.tif", "_label.BMP", "_gt.png")):
        save(root / "images" / f"case{k}.png", grey(k))
        save(root / "masks" / f"case{k}{ending}", blob(k) * 255)
        written[f"case{k}"] = Truth(f"case{k}", grey(k)[..., None], blob(k))
    return written


def write_class_folders(root: Path) -> Written:
    """images/ and masks/0/ ... masks/2/, the last of which lies over the others."""
    written = {}
    for k in range(3):
        save(root / "images" / f"{k}.png", grey(k))
        classes = np.zeros(SIZE, np.uint8)
        for number in range(3):
            save(root / "masks" / str(number) / f"{k}.png", blob(10 * k + number) * 255)
            classes[blob(10 * k + number) > 0] = number + 1
        written[str(k)] = Truth(str(k), grey(k)[..., None], classes)
    return written


def write_sides(root: Path) -> Written:
    """train/, val/ and test/, numbered alike."""
    written = {}
    for k, side in enumerate(("train", "val", "test")):
        image = np.dstack([grey(10 * k + c) for c in range(3)])
        save(root / side / "images" / "1.png", image)
        save(root / side / "masks" / "1.png", blob(k) * 255)
        written[f"{side}_1"] = Truth(f"{side}_1", image, blob(k), side)
    return written


LAYOUTS: dict[str, tuple[str, Callable[[Path], Written]]] = {  # task and writer
    "table": ("fetal_head", write_table),
    "isic2016": ("isic2017", write_isic2016),
    "isic2017": ("isic2017", write_isic2017),
    "isic2018": ("isic2017", write_isic2018),
    "hc18": ("fetal_head", write_hc18),
    "busi": ("breast_lesion", write_busi),
    "spider": ("lumbar_spine", write_spider),
    "matlab": ("lumbar_spine", write_matlab),
    "nnunet": ("isic2017", write_nnunet),
    "nnunet_volumes": ("lumbar_spine", write_nnunet_volumes),
    "folders": ("breast_lesion", write_folders),
    "class_folders": ("spine_structures", write_class_folders),
    "sides": ("isic2017", write_sides),
}

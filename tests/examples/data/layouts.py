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


def colours(seed: int) -> NDArray[np.uint8]:
    """Any image (h w 3)."""
    return np.dstack([grey(seed + c) for c in (0, 10, 20)])


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


def save_deep(path: Path, pixels: NDArray) -> None:
    """Write 16 bits per colour, which Pillow does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(pixels.astype(np.uint16), isVector=pixels.ndim == 3), str(path))


def save_pairs(root: Path, images: list[NDArray], masks: list[NDArray]) -> None:
    """images/ and masks/ called 0.png, 1.png, ..."""
    for k, (image, mask) in enumerate(zip(images, masks, strict=True)):
        save(root / "images" / f"{k}.png", image)
        save(root / "masks" / f"{k}.png", mask)


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


def spine(patient: int, cut: bool = True) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Voxels (5 40 24) and SPIDER's labels: L5 ... L1, a cut vertebra, the canal behind them, discs between them."""
    image = np.random.default_rng(patient).integers(0, 900, (5, 40, 24)).astype(np.int16)
    labels = np.zeros(image.shape, np.uint8)
    for number in range(1, 7):  # from the bottom
        bottom = 40 - 6 * number
        labels[1:4, bottom : bottom + 4, 5:12] = number if number < 6 else 106
        labels[1:4, bottom + 4 : bottom + 6, 5:12] = 200 + number
    labels[2:4, :, 15:18] = 100
    return image, labels if cut else np.where(labels > 99, 0, labels)


def lumbar(labels: NDArray) -> NDArray[np.uint8]:
    """Classes L1 ... L5 of SPIDER's labels."""
    return np.where((labels > 0) & (labels < 6), 6 - labels, 0).astype(np.uint8)


def write_volumes(root: Path, layout: str, patient: int, axes: str | None, mask_axes: str | None = "") -> list[Path]:
    """One patient as SPIDER or nnU-Net store it, with vertebrae alone; the paths of its image and mask."""
    names = {"spider": ("images/{}_t2.mha", "masks/{}_t2.mha"), "nnunet": ("imagesTr/{}_0000.mha", "labelsTr/{}.mha")}
    files = [root / name.format(patient) for name in names[layout]]
    for path, voxels, geometry in zip(files, spine(patient, cut=False), (axes, mask_axes or axes), strict=True):
        save_volume(path, voxels, geometry)
    labels = {"background": 0} | {f"L{k}": 6 - k for k in range(1, 6)}
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    return files


def write_table(root: Path) -> Written:
    """images/, masks/, items.csv."""
    rows, written = ["id,file,group,split,pixel_size_mm,resized_pixel_size_mm,hc_mm"], {}
    save_pairs(root, [grey(k) for k in range(3)], [blob(k) * 255 for k in range(3)])
    for k, split in enumerate(("train", "val", "test")):
        rows.append(f"{k},{k}.png,person_{k},{split},0.1,0.25,{100 + k}")
        written[str(k)] = Truth(f"person_{k}", grey(k)[..., None], blob(k), split, (0.25, 0.25), 100 + k)
    (root / "items.csv").write_text("\n".join(rows) + "\n")
    return written


SIDES = {"Training": "train", "Validation": "val", "Test": "test", "Test_v2": "test"}
ISIC = {  # the folders of images and of masks, and the sets
    2016: ("ISBI2016_ISIC_Part1_{}_Data", "ISBI2016_ISIC_Part1_{}_GroundTruth", "Training Test"),
    2017: ("ISIC-2017_{}_Data", "ISIC-2017_{}_Part1_GroundTruth", "Training Validation Test_v2"),
    2018: ("ISIC2018_Task1-2_{}_Input", "ISIC2018_Task1_{}_GroundTruth", "Training Validation Test"),
}


def write_isic(root: Path, year: int) -> Written:
    """All sets of one year, with superpixels, and one name each in capitals."""
    images, masks, sets = ISIC[year]
    written = {}
    for k, name in enumerate(sets.split()):
        for number, endings in ((2 * k, (".PNG", "_Segmentation.PNG")), (2 * k + 1, (".png", "_segmentation.png"))):
            key = f"ISIC_{number:07d}"
            save(root / images.format(name) / f"{key}{endings[0]}", colours(number))
            save(root / images.format(name) / f"{key}_superpixels.png", colours(number))
            save(root / masks.format(name) / f"{key}{endings[1]}", blob(number) * 255)
            written[key] = Truth(key, colours(number), blob(number), SIDES[name])
    return written


def write_hc18(root: Path) -> Written:
    """Closed outlines, and one of a head that leaves the frame; a test set without annotations."""
    rows, written, size = ["filename,pixel size(mm) ,head circumference (mm) "], {}, (90, 120)
    heads = {
        "000_HC": Ellipse(45, 60, 35, 28, 0.4),
        "010_HC": Ellipse(40, 50, 30, 25, 1.2),
        "010_2HC": Ellipse(42, 90, 48, 35, 2.2),  # cut off at the right
    }
    for k, (name, head) in enumerate(heads.items()):
        line = np.abs(head.radii(*np.indices(size)) - 1) * head.b < 0.8
        save(root / "training_set" / f"{name}.png", grey(k, size))
        save(root / "training_set" / f"{name}_Annotation.png", line * np.uint8(255))
        length = head.circumference() * 0.2
        rows.append(f"{name}.png,0.2,{length}")
        mask = head.fill(size).astype(np.uint8)
        written[name] = Truth(name[:3], grey(k, size)[..., None], mask, "", (0.2, 0.2), length)
    save(root / "test_set" / "000_HC.png", grey(9, size))
    (root / "training_set_pixel_size_and_HC.csv").write_text("\n".join(rows) + "\n")
    (root / "test_set_pixel_size.csv").write_text("filename,pixel size(mm)\n000_HC.png,0.2\n")
    return written


def write_busi(root: Path) -> Written:
    """One to three masks per image, of one bit, RGB and RGBA; a normal image with an empty mask."""
    place, written = root / "Dataset_BUSI_with_GT", {}
    masks = {
        "benign (0)": {"_mask": "1"},
        "benign (1)": {"_mask": "1", "_mask_1": "RGBA"},
        "malignant (2)": {"_mask": "L", "_mask_1": "RGB", "_mask_2": "1"},
        "normal (1)": {"_mask": "RGB"},
    }
    for k, (name, modes) in enumerate(masks.items()):
        folder = name.split()[0]
        layers = [blob(10 * k + number) * (folder != "normal") for number in range(len(modes))]
        save(place / folder / f"{name}.png", grey(k), "RGB")
        for (ending, mode), layer in zip(modes.items(), layers, strict=True):
            save(place / folder / f"{name}{ending}.png", layer * np.uint8(255), mode)
        written[name] = Truth(name, grey(k)[..., None], np.maximum.reduce(layers))
    return written


def write_spider(root: Path, geometries: tuple[str | None, ...] = ("LPS", "PIR", "RAS")) -> Written:
    """A volume for each geometry; slice numbers are those of the file."""
    written = {}
    for k, geometry in enumerate(geometries, start=1):
        image, labels = spine(k)
        save_volume(root / "images" / f"{k}_t2.mha", image, geometry)
        save_volume(root / "masks" / f"{k}_t2.mha", labels, geometry)
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
        image, labels = grey(k, (5, 40, 24)), lumbar(spine(k)[1])
        mask = np.concatenate([labels, labels[:1]])[: 4 + k]
        savemat(root / f"0{k}.mat", {"I": image.transpose(1, 2, 0), "GT": mask.transpose(1, 2, 0)})
        for index in (1, 2, 3):
            written[f"0{k}_{index:03d}"] = Truth(f"0{k}", image[index][..., None], labels[index])
    return written


def write_nnunet(root: Path) -> Written:
    """Three flat files per case, one for each channel, and fold 0."""
    written, folds = {}, [(["case_0", "case_1", "case_2"], ["case_3"]), (["case_3"], ["case_0", "case_1", "case_2"])]
    for k in range(4):
        for c in range(3):
            save(root / "imagesTr" / f"case_{k}_{c:04d}.png", colours(k)[..., c])
        save(root / "labelsTr" / f"case_{k}.png", blob(k))
        written[f"case_{k}"] = Truth(f"case_{k}", colours(k), blob(k), "val" if k == 3 else "train")
    (root / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "melanoma": 1}, "file_ending": ".png"}))
    (root / "splits_final.json").write_text(json.dumps([{"train": train, "val": val} for train, val in folds]))
    return written


def write_nnunet_volumes(root: Path) -> Written:
    """Volumes whose label names are those of the task, in another order; slices lie across the largest spacing."""
    written, values = {}, {"background": 0, "L5": 1, "L1": 2, "L2": 3, "L3": 4, "L4": 5}
    for k in (1, 2):
        image, labels = spine(k)
        classes = lumbar(labels)
        save_volume(root / "imagesTr" / f"s{k}_0000.nii.gz", image, None)
        save_volume(root / "labelsTr" / f"s{k}.nii.gz", np.array([0, 2, 3, 4, 5, 1], np.uint8)[classes], None)
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
        save(root / side / "images" / "1.png", colours(k))
        save(root / side / "masks" / "1.png", blob(k) * 255)
        written[f"{side}_1"] = Truth(f"{side}_1", colours(k), blob(k), side)
    return written


LAYOUTS: dict[str, tuple[str, Callable[[Path], Written]]] = {  # task and writer
    "table": ("fetal_head", write_table),
    **{f"isic{year}": ("isic2017", partial(write_isic, year=year)) for year in ISIC},
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


def write(layout: str, root: Path) -> tuple[str, Written]:
    """Write a layout; its task and what it holds."""
    task, writer = LAYOUTS[layout]
    return task, writer(root)

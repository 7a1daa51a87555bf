"""Draw the masks that a trained network predicts for images, folders of images and volumes.

    python examples/predict.py --run runs/isic --out masks photo.jpg FOLDER
    python examples/predict.py --run runs/fetal_head --out masks --pixel-size-csv test_set_pixel_size.csv test_set

Each image gets NAME.png with the task's label values and NAME-overlay.png with contours, both of its own size; each
volume NAME.mha with class numbers and its own geometry. predictions.csv has a row for each; of fetal heads with pixel
sizes also the head circumference in mm. Files that cannot be read are named, skipped and counted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from skimage.segmentation import find_boundaries

from segmentation.checkpoints import Trained, load_run
from segmentation.data import simpleitk as sitk
from segmentation.data.ellipse import head_circumference
from segmentation.data.formats.files import IMAGES, VOLUMES, files_in, positive, read_rows, stem
from segmentation.data.formats.voxels import read_volume, sagittal, to_pixels
from segmentation.data.item import Pixels, read_image
from segmentation.evaluation import whole_file, write_csv
from segmentation.figures import picture
from segmentation.inference import flip_axes, probabilities, to_classes_map

COLOURS = np.array([[0, 194, 168], [255, 176, 0], [254, 97, 0], [220, 38, 127], [120, 94, 240]], np.uint8)
Predict = Callable[[Pixels], NDArray[np.uint8]]

console = Console()


def build_parser() -> ArgumentParser:
    """All flags."""
    parser = ArgumentParser(prog="predict.py", description="Predict masks of images, folders and volumes.")
    add = parser.add_argument
    add("inputs", nargs="+", type=Path, help="image files, volumes (.mha, .nii, .nii.gz), or folders of them")
    add("--run", type=Path, required=True, help="run folder of train.py, or one of its .ckpt files")
    add("--out", type=Path, required=True, help="folder for masks, overlays and predictions.csv")
    add("--window", action="store_true", help="windows of the image at its own resolution, not the squashed image")
    add("--flips", action="store_true", help="average over the flips of the task's augmentation")
    add("--pixel-size-csv", type=Path | None, help="columns filename, pixel size(mm), as in HC18")
    add("--overwrite", action="store_true", help="write into --out although it holds files")
    return parser


def list_files(inputs: Sequence[Path]) -> list[Path]:
    """The files given, and those in the folders given, sorted; two that would have one name are refused."""
    files: list[Path] = []
    for path in inputs:
        if not path.exists():
            raise FileNotFoundError(f"input {str(path)!r} does not exist: give an image, a volume or a folder of them")
        files += files_in(path, (*IMAGES, *VOLUMES)) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"no image in {[str(path) for path in inputs]}: files may end in {' '.join(IMAGES + VOLUMES)}")
    named: dict[str, Path] = {}
    for path in files:
        if stem(path) in named:
            raise ValueError(
                f"{named[stem(path)]} and {path} would both be written as {stem(path)!r}: rename one of them"
            )
        named[stem(path)] = path
    return files


def read_pixel_sizes(table: Path) -> dict[str, float]:
    """Millimetres a pixel of each file name, from a table as HC18 has them."""
    if not table.is_file():
        raise FileNotFoundError(f"pixel-size-csv {str(table)!r} does not exist")
    columns, rows = read_rows(table)
    titles = {column.lower().replace(" ", ""): column for column in columns}
    if missing := [title for title in ("filename", "pixelsize(mm)") if title not in titles]:
        raise ValueError(f"{table} has no column {missing[0]!r}: it needs filename and pixel size(mm)")
    name, size = titles["filename"], titles["pixelsize(mm)"]
    return {row[name]: positive(row[size], size, f"{table} line {line}") for line, row in enumerate(rows, start=2)}


def predict_image(path: Path, out: Path, trained: Trained, predict: Predict, sizes: dict[str, float]) -> dict[str, Any]:
    """Write mask and overlay of one image; its row of predictions.csv."""
    image = read_image(path, trained.task.in_channels)
    classes = predict(image)
    values = np.array([0, *trained.task.labels], np.uint8)
    save(Image.fromarray(values[classes]), out / f"{stem(path)}.png")
    save(Image.fromarray(overlay(image, classes)), out / f"{stem(path)}-overlay.png")
    row: dict[str, Any] = {"file": path.name, "foreground": int((classes > 0).sum())}
    if sizes:
        size = sizes.get(path.name)
        row["hc_mm"] = None if size is None else head_circumference(classes, (size, size))
    return row


def overlay(image: Pixels, classes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The image in colours (h w 3) with the inner contour of every class."""
    shown = picture(image, (image.shape[1], image.shape[0])).copy()
    for number in range(1, int(classes.max()) + 1):
        shown[find_boundaries(classes == number, mode="inner")] = COLOURS[(number - 1) % len(COLOURS)]
    return shown


def predict_volume(path: Path, out: Path, trained: Trained, predict: Predict) -> dict[str, Any]:
    """Predict every sagittal slice and write a volume of class numbers on the grid of the file."""
    volume = read_volume(path)
    laid = sagittal(volume)
    pixels = to_pixels(sitk.GetArrayFromImage(laid), path)  # s h w
    classes = np.stack([predict(plane[..., None].repeat(trained.task.in_channels, axis=2)) for plane in pixels])
    labels = sitk.GetImageFromArray(classes)
    labels.CopyInformation(laid)
    # Axes were only exchanged and turned, so every voxel of the file has exactly one of these at its place.
    labels = sitk.Resample(labels, volume, sitk.Transform(), sitk.sitkNearestNeighbor)
    with whole_file(out / f"{stem(path)}.mha") as draft:
        sitk.WriteImage(labels, str(draft), useCompression=True)
    return {"file": path.name, "foreground": int((classes > 0).sum())}


def save(image: Image.Image, path: Path) -> None:
    """Write an image whole or not at all."""
    with whole_file(path) as draft:
        image.save(draft)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Predict everything; returns the rows of predictions.csv and what could not be read."""
    settings = build_parser().parse_args(sys.argv[1:] if argv is None else list(argv))
    trained = load_run(settings.run)
    trained.network.to("cuda" if torch.cuda.is_available() else "cpu")
    files = list_files(settings.inputs)
    if settings.flips:
        flip_axes(trained.task, trained.image_size)
    if settings.pixel_size_csv and trained.task.name != "fetal_head":
        raise ValueError(
            f"pixel-size-csv measures heads, but {str(settings.run)!r} was trained for {trained.task.name}"
        )
    sizes = read_pixel_sizes(settings.pixel_size_csv) if settings.pixel_size_csv else {}
    if settings.out.exists() and any(settings.out.iterdir()) and not settings.overwrite:
        raise FileExistsError(f"out {str(settings.out)!r} is not empty: add --overwrite, or give another folder")
    settings.out.mkdir(parents=True, exist_ok=True)

    def predict(image: Pixels) -> NDArray[np.uint8]:
        how = {"window": settings.window, "flips": settings.flips}
        return to_classes_map(probabilities(trained.network, trained.task, image, trained.image_size, **how))

    rows, unreadable = [], []
    for path in track(files, description="predicting", console=console, disable=not console.is_terminal):
        try:
            if path.name.lower().endswith(VOLUMES):
                rows.append(predict_volume(path, settings.out, trained, predict))
            else:
                rows.append(predict_image(path, settings.out, trained, predict, sizes))
        except (ValueError, OSError) as error:
            unreadable.append({"file": str(path), "reason": str(error)})
    if rows:
        columns = {name for row in rows for name in row}
        order = [name for name in ("file", "foreground", "hc_mm") if name in columns]
        write_csv(settings.out / "predictions.csv", [{name: row.get(name) for name in order} for row in rows])
    console.print(f"{len(rows)} of {len(files)} files predicted, in {settings.out}", soft_wrap=True)
    for entry in unreadable:
        console.print(f"[yellow]skipped: {escape(entry['reason'])}", soft_wrap=True)
    return {"rows": rows, "unreadable": unreadable}


if __name__ == "__main__":
    sys.exit(0 if main()["rows"] else 1)

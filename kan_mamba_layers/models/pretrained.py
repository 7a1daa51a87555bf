"""The weights that the library brings."""

import fnmatch
from pathlib import Path

_WEIGHTS = Path(__file__).resolve().parents[1] / "weights"


def list_pretrained(pattern: str = "*") -> list[str]:
    """Return the names of the weights that the library brings, sorted.

    ``create_model(model, pretrained=name)`` and :meth:`Segmenter.from_pretrained` load them without a network. Each
    has a model card, ``kan_mamba_layers/weights/NAME/README.md``, with its data, licence, scores and limits.

    Args:
        pattern: a shell-style pattern.

    Example:
        >>> list_pretrained("fetal*")
        ['fetal_head']
    """
    return sorted(fnmatch.filter((path.parent.name for path in _WEIGHTS.glob("*/config.json")), pattern))


def brought(name: str) -> Path:
    """The folder of the weights of that name."""
    return _WEIGHTS / name


def folder_of(name: str | Path) -> Path:
    """The folder of the weights of that name, or else ``name`` itself as a folder, which a ``Path`` always is."""
    folder = Path(name)
    if isinstance(name, str) and name in list_pretrained():
        if (folder / "config.json").is_file():
            raise ValueError(
                f"{name!r} is one of list_pretrained() and also a folder that holds a model; write './{name}' for the "
                "folder, or rename it"
            )
        return brought(name)
    if not folder.is_dir():
        known = ", ".join(list_pretrained())
        raise FileNotFoundError(f"{str(name)!r} is neither one of list_pretrained() ({known}) nor a folder; pass one")
    return folder

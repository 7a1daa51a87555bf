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


def folder_of(name: str | Path) -> Path:
    """The folder of weights of that name, or else ``name`` itself as a folder."""
    if str(name) in list_pretrained():
        return _WEIGHTS / str(name)
    if not Path(name).is_dir():
        known = ", ".join(list_pretrained())
        raise FileNotFoundError(f"{str(name)!r} is neither one of list_pretrained() ({known}) nor a folder; pass one")
    return Path(name)

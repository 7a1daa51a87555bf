"""What all layers and models have in common, and the groups of parameters for an optimiser."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import Tensor, nn

from kan_mamba_layers._check import check_number


class Layer(nn.Module):
    """The base class of the layers and models.

    A subclass names its parameters without weight decay in ``undecayed``. They carry ``_no_weight_decay = True``, as in
    the code of the Mamba family. PyTorch drops attributes of parameters that it copies or replaces, so they are set
    again wherever it does.
    """

    undecayed: tuple[str, ...] = ()

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters of scans without weight decay, as timm's optimisers ask for them.

        These are the dynamics of every :class:`SS2D`, :class:`SS3D` and :class:`Mamba`, such as ``A_logs``. See
        :func:`param_groups`.
        """
        return {
            f"{prefix}.{name}".removeprefix(".")
            for prefix, module in self.named_modules()
            if isinstance(module, Layer)
            for name, _ in module.named_parameters()
            if name.removeprefix("parametrizations.").split(".")[0].removesuffix("_orig") in module.undecayed
        }

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        self._mark()

    def __setstate__(self, state: dict[str, Any]) -> None:  # deepcopy, pickle
        super().__setstate__(state)
        self._mark()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Layer":
        super()._apply(fn, recurse)
        self._mark()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._mark()

    def _mark(self) -> None:
        for name in self.undecayed:
            if (parameter := self._parameters.get(name)) is not None:
                parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def __prepare_scriptable__(self) -> NoReturn:
        raise TypeError(
            f"torch.jit.script cannot compile {type(self).__name__}; use torch.jit.trace, torch.export or torch.compile"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each module is in its own mode again."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Divide the trainable parameters of a model into two groups for an optimiser: with and without weight decay.

    As in timm, biases and all parameters with fewer than two dimensions, such as the weights of norms, do not decay,
    nor do those that a module of the model names in ``no_weight_decay()`` or that carry ``_no_weight_decay``:
    ``A_logs``, ``Ds`` and ``dt_projs_bias`` of every :class:`SS2D` and :class:`SS3D`, and ``A_log``, ``D`` and
    ``dt_proj.bias`` of every :class:`Mamba`.

    Args:
        model: any module, also one that merely contains layers of this library.
        weight_decay: of the first group, at least 0; that of the second is 0.

    Returns:
        Two groups, in which every trainable parameter occurs once, also one that is shared. A shared parameter that
        must not decay under one of its names does not decay.

    Raises:
        TypeError: ``weight_decay`` is not a number.
        ValueError: ``weight_decay`` is negative or not finite.

    Example:
        >>> import torch
        >>> from kan_mamba_layers import SS2D
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), SS2D(8))
        >>> optimizer = torch.optim.AdamW(param_groups(model, 0.05), lr=1e-3)
        >>> [(group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
        [(0.05, 6), (0.0, 7)]
    """
    check_number("weight_decay", weight_decay, 0.0)
    exempt = {
        f"{prefix}.{name}".removeprefix(".")
        for prefix, module in model.named_modules(remove_duplicate=False)
        if callable(getattr(module, "no_weight_decay", None))
        for name in module.no_weight_decay()
    }
    parameters: dict[int, nn.Parameter] = {}
    undecayed = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            parameters[id(parameter)] = parameter
            is_bias = parameter.ndim < 2 or name.rpartition(".")[2] == "bias"
            if is_bias or name in exempt or getattr(parameter, "_no_weight_decay", False):
                undecayed.add(id(parameter))
    return [
        {"params": [p for key, p in parameters.items() if key not in undecayed], "weight_decay": float(weight_decay)},
        {"params": [p for key, p in parameters.items() if key in undecayed], "weight_decay": 0.0},
    ]

"""The layer around a scan of a grid, in any number of dimensions: what SS2D and SS3D have in common."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from inspect import signature
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kan_mamba_layers._check import check_mask, check_number, check_pixels, check_shape
from kan_mamba_layers.layers.depthwise import depthwise_conv
from kan_mamba_layers.layers.dynamics import check_steps, inner_sizes, reset_recurrence, reset_steps
from kan_mamba_layers.layers.module import Layer
from kan_mamba_layers.ops import cross_selective_scan
from kan_mamba_layers.ops.backend import Backend, check_backend
from kan_mamba_layers.ops.precision import check_dtype
from kan_mamba_layers.ops.selective_scan.directions import NUM_DIRECTIONS
from kan_mamba_layers.walks import Walks, volume

MakeWalks = Callable[..., Walks]  # of the sizes of the grid

# The dimensions of images and volumes that move the channels from the last place to the first, and back.
_LAYOUTS = {4: ((0, 3, 1, 2), (0, 2, 3, 1)), 5: ((0, 4, 1, 2, 3), (0, 2, 3, 4, 1))}


class GridScan(Layer):
    """The base class of :class:`SS2D` and :class:`SS3D`, which say what their grid is."""

    undecayed = ("A_logs", "Ds", "dt_projs_bias")
    grid_letters: ClassVar[tuple[str, ...]]  # such as ("h", "w")
    _conv_name: ClassVar[str]
    _default_walks: ClassVar[MakeWalks | None] = None  # None: the four directions of an image, without a table

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 3,
        expand: float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        *,
        walks: MakeWalks | None = None,
        gate: bool = True,
        norm: bool = True,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dropout: float = 0.0,
        conv_bias: bool = True,
        bias: bool = False,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_inner, rank = inner_sizes(d_model, d_state, d_conv, expand, dt_rank)
        if d_conv % 2 == 0:
            raise ValueError(f"d_conv must be odd to keep the size of the image, got {d_conv}; use {d_conv + 1}")
        check_steps(dt_min, dt_max, dt_init_floor)
        check_number("dropout", dropout, 0.0, 1.0, open_high=True)
        check_backend("cross_selective_scan", backend)
        self.d_model = d_model
        self.d_state = d_state
        self.d_inner = d_inner
        self.dt_rank = rank
        self.walks = type(self)._default_walks if walks is None else walks
        self.directions = NUM_DIRECTIONS if self.walks is None else _directions(self.walks, self.grid_letters)
        self.gate = gate
        self.dt_min = dt_min
        self.dt_max = dt_max
        self.dt_init_floor = dt_init_floor
        self.backend: Backend = backend
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, **factory))

        d, n, r, k = self.d_inner, d_state, rank, self.directions
        self.in_proj = nn.Linear(d_model, 2 * d if gate else d, bias=bias, **factory)
        conv = depthwise_conv(d, d_conv, len(self.grid_letters), bias=conv_bias, **factory)
        self.add_module(self._conv_name, conv)
        self.x_proj_weight = parameter(k, r + 2 * n, d)
        self.dt_projs_weight = parameter(k, d, r)
        self.dt_projs_bias = parameter(k, d)
        self.A_logs = parameter(k * d, n)
        self.Ds = parameter(k * d)
        self.out_norm = nn.LayerNorm(d, **factory) if norm else nn.Identity()
        self.out_proj = nn.Linear(d, d_model, bias=bias, **factory)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reinitialise; initial step sizes are log-uniform in ``[dt_min, dt_max]`` and ``A = -(1, ..., n)``."""
        for module in (self.in_proj, getattr(self, self._conv_name), self.out_norm, self.out_proj):
            if not isinstance(module, nn.Identity):
                module.reset_parameters()
        nn.init.uniform_(self.x_proj_weight, -(self.d_inner**-0.5), self.d_inner**-0.5)
        nn.init.uniform_(self.dt_projs_weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        reset_steps(self.dt_projs_bias, self.dt_min, self.dt_max, self.dt_init_floor)
        reset_recurrence(self.A_logs, self.Ds)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # b *grid c
        """Mix the positions of a grid of any size; where ``mask`` is False they are left out, and the output is 0."""
        walks, hidden = self._checked(x, mask)
        if hidden is not None:
            x = x.masked_fill(hidden, 0)
        u = self.in_proj(x)  # b *grid d, and as much again for the gate
        if self.gate:
            u, z = u.chunk(2, -1)
        first, last = _LAYOUTS[u.ndim]
        u = u.permute(first)  # b d *grid
        if hidden is not None:  # the projection may have a bias; before the permutation Inductor could not compile it
            u = u.masked_fill(hidden.permute(first), 0)
        u = F.silu(getattr(self, self._conv_name)(u)).permute(last)  # b *grid d
        y = cross_selective_scan(
            u,
            self.x_proj_weight,
            self.dt_projs_weight,
            self.dt_projs_bias,
            self.A_logs,
            self.Ds,
            walks=walks,
            mask=mask,
            backend=self.backend,
        )
        y = self.out_norm(y)
        if self.gate:
            y = y * F.silu(z)
        y = self.dropout(self.out_proj(y))
        return y if hidden is None else y.masked_fill(hidden, 0)

    def _checked(self, x: Tensor, mask: Tensor | None) -> tuple[Walks | None, Tensor | None]:  # hidden: b *grid 1
        """The walks through the grid of ``x``, and where the mask leaves positions out."""
        letters, conv = ("b", *self.grid_letters), self._conv_name
        check_shape("x", x, ("any",) * len(letters) + (self.d_model,), ", ".join((*letters, "d_model")))
        grid = tuple(x.shape[1:-1])
        check_pixels("x", x, *grid)
        check_dtype("x", x, conv + ".weight", getattr(getattr(self, conv), "weight", None))
        if mask is not None:
            check_mask("mask", mask, x.shape[:-1], ", ".join(letters))
        made = None if self.walks is None else _made(self.walks, grid)
        if made is not None and len(made) != self.directions:
            raise ValueError(
                f"walks must have {self.directions} directions at every size, as when the layer was made, got "
                f"{len(made)} from {_named(self.walks)} at {grid}; return as many for every grid"
            )
        return made, None if mask is None else ~mask[..., None]

    def extra_repr(self) -> str:
        walks = "" if self.walks is None else f"walks={_named(self.walks)}, "
        return (
            f"{self.d_model}, d_state={self.d_state}, d_inner={self.d_inner}, dt_rank={self.dt_rank}, {walks}"
            f"gate={self.gate}, backend={self.backend!r}"
        )


def _named(walks: Any) -> str:
    """A function that makes walks, as one would write it."""
    if isinstance(walks, partial):
        given = [*map(repr, walks.args), *(f"{name}={value!r}" for name, value in walks.keywords.items())]
        return f"partial({', '.join([_named(walks.func), *given])})"
    name = getattr(walks, "__qualname__", None)
    if name is None:
        return repr(walks)
    return f"walks.{name}" if walks.__module__ == volume.__module__ else str(name)


def _directions(walks: Any, letters: tuple[str, ...]) -> int:
    """How many directions a function of the sizes makes, or raise if it is not one."""
    sizes, image, grid = ", ".join(letters), len(letters) == 2, (2, 4, 8)[: len(letters)]
    fix = f"pass a function of {sizes}, such as walks.{'snake' if image else 'volume'}"
    if not callable(walks):
        raise TypeError(f"walks must be a function of {sizes}, got {walks!r}; {fix}")
    with suppress(ValueError):  # a builtin may have no signature
        try:
            signature(walks).bind(*grid)
        except TypeError as error:
            raise TypeError(
                f"walks must be a function of {sizes}, got {_named(walks)}, which does not take them alone ({error}); "
                f"{fix}{', or functools.partial(walks.windows, size=7)' if image else ''}"
            ) from None
    with torch.device("cpu"):  # where a model is made on "meta", orders have values all the same
        return len(_made(walks, grid))


def _made(walks: MakeWalks, grid: tuple[int, ...]) -> Walks:
    """The walks through a grid."""
    made = walks(*grid)
    if not isinstance(made, Walks):
        raise TypeError(
            f"walks must return a Walks, got {made!r} from {_named(walks)}; make them by kan_mamba_layers.walks"
        )
    if made.grid != grid:
        raise ValueError(
            f"walks must return walks of the sizes it gets, got {made!r} from {_named(walks)} at {grid}; pass the "
            "sizes on in their order"
        )
    return made

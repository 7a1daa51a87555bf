"""The records of a scan along a sequence and of a fused scan.

The fused form serves both public ops: ``k`` directions over the same positions, and ``g`` groups of channels that share
coefficients.
"""

import math
from typing import NamedTuple

from torch import Tensor

from kan_mamba_layers._check import check_same_device, check_shape, check_tensor
from kan_mamba_layers.ops.limits import count_groups
from kan_mamba_layers.ops.precision import compute_dtype

# The fused backends compute e^x as 2^(x LOG2E).
LOG2E = math.log2(math.e)
LN2 = math.log(2)


class Line(NamedTuple):
    """The arguments of a scan along a sequence, but for its gate."""

    u: Tensor  # b d l
    delta: Tensor  # b d l
    A: Tensor  # d n
    B: Tensor  # d n | b n l | b g n l; prepared: b g l n
    C: Tensor  # d n | b n l | b g n l; prepared: b g l n
    D: Tensor | None  # d
    delta_bias: Tensor | None  # d
    initial_state: Tensor | None  # b d n
    softplus: bool

    def check(self) -> None:
        """All shapes fit."""
        check_shape("u", self.u, ("any", "any", "any"), "b, d, l")
        batch, channels, length = self.u.shape
        if length < 1:
            raise ValueError(f"u must have at least one time step, got shape {tuple(self.u.shape)}; pass l >= 1")
        check_shape("delta", self.delta, (batch, channels, length), "b, d, l")
        check_shape("A", self.A, (channels, "any"), "d, n")
        states = self.A.shape[1]
        for name, x in (("B", self.B), ("C", self.C)):
            check_tensor(name, x)
            if x.ndim == 2:
                check_shape(name, x, (channels, states), "d, n")
            elif x.ndim == 3:
                check_shape(name, x, (batch, states, length), "b, n, l")
            else:
                check_shape(name, x, (batch, "any", states, length), "b, g, n, l")
                groups = x.shape[1]
                if groups < 1 or channels % groups:
                    raise ValueError(
                        f"{name} has {groups} groups, which do not divide the {channels} channels of u; use a divisor"
                    )
        for name, vector in (("D", self.D), ("delta_bias", self.delta_bias)):
            if vector is not None:
                check_shape(name, vector, (channels,), "d")
        if self.initial_state is not None:
            check_shape("initial_state", self.initial_state, (batch, channels, states), "b, d, n")
        others = {"D": self.D, "delta_bias": self.delta_bias, "initial_state": self.initial_state}
        check_same_device("u", self.u, delta=self.delta, A=self.A, B=self.B, C=self.C, **others)

    def prepared(self, rounds: bool) -> "Line":
        """The same with ``B`` and ``C`` by groups, in the compute dtype; ``u`` stays as it is if y is to be rounded."""
        batch, channels, length = self.u.shape
        groups = count_groups(self.B, self.C, channels)
        dtype = compute_dtype(self.u)

        def per_group(x: Tensor) -> Tensor:  # any form of B or C -> b g l n
            if x.ndim == 2:  # d n: constant in time, every channel is a group of its own
                x = x if channels else x.new_zeros(1, x.shape[1])  # one group, for no channels
                return x.to(dtype)[None, :, None].expand(batch, groups, length, x.shape[1])
            x = (x[:, None] if x.ndim == 3 else x).to(dtype)  # b g' n l
            return x.repeat_interleave(groups // x.shape[1], 1).transpose(2, 3)

        D, bias, state = (None if x is None else x.to(dtype) for x in (self.D, self.delta_bias, self.initial_state))
        u = self.u if rounds else self.u.to(dtype)
        inputs = (u, self.delta.to(dtype), self.A.to(dtype), per_group(self.B), per_group(self.C))
        return Line(*inputs, D, bias, state, self.softplus)


class ScanCall(NamedTuple):
    """The arguments of a scan along ``k`` directions over ``l = height width`` positions, whose results are added.

    Without ``orders`` the directions are those of an image: rows, columns, and the two reversed. With ``orders``
    direction ``k`` visits position ``orders[k, t]`` at time ``t``, and ``height`` is 1. Where ``mask`` is 0 the step
    size is 0, so that the state stays as it is.
    """

    u: Tensor  # b l d
    coeffs: Tensor | None  # b l k*g r+2n: the low-rank step, B and C of every direction and group
    x_proj_weight: Tensor | None  # k r+2n d: makes the coefficients where they are not given, in backend "cpu"
    delta: Tensor | None  # b l k d: given where r = 0
    dt_proj_weight: Tensor  # k d r
    dt_proj_bias: Tensor  # k d
    A: Tensor  # k d n
    D: Tensor  # d
    initial_state: Tensor | None  # b k d n
    height: int
    width: int
    softplus: bool
    orders: Tensor | None = None  # k l, int32
    mask: Tensor | None = None  # b l, 1 or 0 in the dtype of A

    @property
    def groups(self) -> int:
        """Groups of channels with coefficients of their own."""
        return 1 if self.coeffs is None else self.coeffs.shape[2] // self.A.shape[0]

    @property
    def log2_decay(self) -> Tensor:  # k d n
        """``A log2(e)``: a step ``dt`` multiplies the state by 2 to the power of ``dt`` times it."""
        return self.A * LOG2E

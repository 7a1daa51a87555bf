"""SS3D: the selective scan of a volume along several walks as a layer."""

from torch import nn

from kan_mamba_layers.layers.grid_scan import GridScan
from kan_mamba_layers.walks import volume


class SS3D(GridScan):
    r"""Mix the voxels of a whole volume at linear cost, by selective scans along six directions or other walks.

    The formula is that of :class:`SS2D`, with a depthwise convolution of three dimensions and the scan along ``k``
    directions through the volume:

    .. math::
        (u, z) &= W_\mathrm{in}\, x, \qquad
        y = \mathrm{LayerNorm}(\mathrm{scan}_k(\mathrm{SiLU}(\mathrm{DWConv}(u)))) \\
        \mathrm{SS3D}(x) &= \mathrm{Dropout}(W_\mathrm{out}(y \odot \mathrm{SiLU}(z)))

    Args:
        d_model: channels of input and output, ``c``.
        d_state: state size of each channel's recurrence.
        d_conv: size of the depthwise convolution along each axis, odd.
        expand: the scan has ``d_inner = expand * d_model`` channels.
        dt_rank: rank of the step projection, or ``"auto"`` for ``ceil(d_model / 16)``.
        walks: makes the walks of a volume of ``(d, h, w)``: any function of three integers that returns
            :class:`~kan_mamba_layers.walks.Walks` of that grid. It is called at every forward pass, and once before,
            with ``(2, 4, 8)``, for the number of directions ``k``, which must not depend on the size. By default
            ``walks.volume``.
        gate: see :class:`SS2D`.
        norm: see :class:`SS2D`.
        dt_min: smallest initial step.
        dt_max: largest initial step.
        dt_init_floor: lower bound of the initial steps.
        dropout: dropout rate of the output, in ``[0, 1)``.
        conv_bias: whether the depthwise convolution has a bias.
        bias: whether the input and output projections have biases.
        backend: implementation of :func:`~kan_mamba_layers.ops.cross_selective_scan`.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        Input and output ``(b, d, h, w, d_model)``, channels last, with ``d`` the depth. ``mask``, if given, is a
        boolean tensor ``(b, d, h, w)``, False where a voxel is to be left out.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: see :class:`SS2D`.

    Numerics:
        See :class:`SS2D`, also for masks.

    Example:
        >>> import torch
        >>> SS3D(8)(torch.randn(1, 3, 6, 5, 8)).shape
        torch.Size([1, 3, 6, 5, 8])

    References:
        Liu et al., VMamba, arXiv 2401.10166, section 4, with the walks of a volume; see
        :func:`~kan_mamba_layers.walks.volume`.
    """

    grid_letters = ("d", "h", "w")
    _conv_name = "conv3d"
    _default_walks = staticmethod(volume)
    conv3d: nn.Conv3d

"""SS2D: the selective scan of an image along several walks as a layer."""

from torch import nn

from kan_mamba_layers.layers.grid_scan import GridScan


class SS2D(GridScan):
    r"""Mix the pixels of a whole image at linear cost, by selective scans along four directions or other walks.

    .. math::
        (u, z) &= W_\mathrm{in}\, x, \qquad
        y = \mathrm{LayerNorm}(\mathrm{scan}_k(\mathrm{SiLU}(\mathrm{DWConv}(u)))) \\
        \mathrm{SS2D}(x) &= \mathrm{Dropout}(W_\mathrm{out}(y \odot \mathrm{SiLU}(z)))

    Without the gate :math:`u = W_\mathrm{in}\, x`, and :math:`\mathrm{SS2D}(x) = \mathrm{Dropout}(W_\mathrm{out}\, y)`.
    The scan is :func:`~kan_mamba_layers.cross_selective_scan` along ``k`` directions.

    Args:
        d_model: channels of input and output, ``c``.
        d_state: state size ``n`` of each channel's recurrence.
        d_conv: size of the depthwise convolution, odd.
        expand: the scan has ``d_inner = expand * d_model`` channels.
        dt_rank: rank of the step projection, or ``"auto"`` for ``ceil(d_model / 16)``.
        walks: makes the walks of an image of ``(h, w)``: ``walks.snake``, ``partial(walks.windows, size=7)``, or any
            function of two integers that returns :class:`~kan_mamba_layers.walks.Walks` of that grid. It is called at
            every forward pass, and once before, with ``(2, 4)``, for the number of directions ``k``, which must not
            depend on the size. By default the four directions of VMamba, as from ``walks.cross``.
        gate: whether the output of the scan is multiplied by a gate, as in VMamba v0; VMamba v2 has none.
        norm: whether the output of the scan passes a LayerNorm over the channels, as in all published weights; VMamba's
            ``onnone`` has none.
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
        Input and output ``(b, h, w, d_model)``, channels last. ``mask``, if given, is a boolean tensor ``(b, h, w)``,
        False where a pixel is to be left out.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, an input has the wrong shape or, without autocast, another dtype than
            the parameters, or ``walks`` returns walks of another grid, or of another number of directions than before.

    Numerics:
        The scan runs in float32 at least; see :func:`~kan_mamba_layers.ops.cross_selective_scan`. ``A_logs``, ``Ds``
        and ``dt_projs_bias`` carry ``_no_weight_decay = True``; :func:`~kan_mamba_layers.param_groups` honours it.

        A pixel with ``mask`` False has a step of exactly 0, so it leaves the state as it is, its output is 0, and no
        gradient gets anything from it, even if its input is not finite. The convolution still counts it, as an input of
        0. Along all walks of this library but ``walks.hilbert``, whose curve depends on the size, images that are
        padded at the right and at the bottom get what each alone would give.

    Example:
        >>> import torch
        >>> from kan_mamba_layers import walks
        >>> SS2D(8)(torch.randn(2, 6, 5, 8)).shape
        torch.Size([2, 6, 5, 8])
        >>> layer = SS2D(8, walks=lambda h, w: walks.cross(h, w) + walks.diagonal(h, w))
        >>> layer.A_logs.shape  # 8 directions of 16 channels
        torch.Size([128, 16])
        >>> x = torch.randn(2, 6, 5, 8)
        >>> layer(x, mask=x[..., 0] > 0).shape
        torch.Size([2, 6, 5, 8])

    References:
        Liu et al., VMamba, arXiv 2401.10166, section 4; initial values as in Gu and Dao, Mamba, arXiv 2312.00752,
        section 3.6. The parameter names are those of VMamba v0 and its descendants, whose weights load strictly. The
        published VMamba v2 (``v05_noz``) is ``gate=False, conv_bias=False``; see :class:`VSSBlock`.
    """

    grid_letters = ("h", "w")
    _conv_name = "conv2d"
    conv2d: nn.Conv2d

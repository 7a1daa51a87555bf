"""The published models that `python -m benchmarks clients` knows."""

from typing import Any, NamedTuple

import torch
from torch import nn


class Client(NamedTuple):
    """A model of a repository: the expression `make`, in `module`, gives it."""

    repository: str  # the name of the checkout's folder: NAME, or NAME@COMMIT
    module: str
    make: str
    inputs: tuple[Any, ...] = ((2, 3, 32, 32),)  # the shape of a tensor each; anything else is passed on as it is
    folders: tuple[str, ...] = (".",)  # of the checkout, first on the import path
    force: bool = False  # shadow the files of the repository that have names of the stand-ins
    keep: bool = False  # its own mamba_ssm, without the kernels


NAMES: dict[str, Any] = {  # that the expressions may use
    "nn": nn,
    "UNET": {
        "n_stages": 4,
        "features_per_stage": (16, 32, 64, 64),
        "kernel_sizes": [[3, 3]] * 4,
        "strides": [[1, 1]] + [[2, 2]] * 3,
        "n_conv_per_stage": [2] * 4,
        "n_conv_per_stage_decoder": [1] * 3,
        "conv_op": nn.Conv2d,
        "norm_op": nn.InstanceNorm2d,
        "norm_op_kwargs": {"affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {},
    },
}
_SMALL = "depths=[1, 1, 1, 1]"
_VIM = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
_IMAGE, _CLASSIFIER = ((2, 3, 32, 32),), ("classification",)

CLIENTS = (
    Client("KM_UNet", "archs", "KM_UNet(1, embed_dims=[128, 160, 256])"),
    Client("VM-UNet", "models.vmunet.vmunet", "VMUNet(depths=[2, 2, 2, 2], depths_decoder=[2, 2, 2, 1])"),
    Client("VM-UNetV2", "models.vmunet.vmunet_v2", "VMUNetV2(depths=[2, 2, 2, 2])"),
    Client("H-vmunet", "models.H_vmunet", "H_vmunet(layer_scale_init_value=1)"),
    Client("UltraLight-VM-UNet", "models.UltraLight_VM_UNet", "UltraLight_VM_UNet()"),
    Client("Mamba-UNet", "mamba_sys", "VSSM(num_classes=4)", ((2, 1, 32, 32),), ("code/networks",)),
    Client("Swin-UMamba", "nnunetv2.nets.SwinUMamba", "SwinUMamba(3, 2)", folders=("swin_umamba",)),
    Client("U-Mamba", "nnunetv2.nets.UMambaBot_2d", "UMambaBot(3, num_classes=2, **UNET)", folders=("umamba",)),
    Client(
        "U-Mamba",
        "nnunetv2.nets.UMambaEnc_2d",
        "UMambaEnc((32, 32), 3, num_classes=2, **UNET)",
        folders=("umamba",),
    ),
    Client("LKM-UNet", "nnunetv2.nets.LKMUNet", "LKMUNet(3, num_classes=2, **UNET)", folders=("lkmunet",)),
    Client("LightM-UNet", "nnunetv2.nets.LightMUNet", "LightMUNet(2, in_channels=3)", folders=("lightm-unet",)),
    Client(
        "MedVKAN",
        "nnunetv2.nets.MedVKAN",
        "MedVKAN({'num_input_channels': 3, 'in_chans': 96, 'feat_size': [12, 24, 48, 96, 192, 384]}, "
        "{'num_classes': 2, 'deep_supervision': False, 'feat_size': [12, 24, 48, 96, 192, 384]})",
        folders=("medvkan",),
    ),
    Client(
        "SegMamba",
        "model_segmamba.segmamba",
        f"SegMamba(4, 4, {_SMALL}, feat_size=[48, 24, 32, 48], hidden_size=64)",
        ((1, 4, 32, 32, 32),),
    ),
    Client("nnMamba", "nnMamba", "nnMambaSeg(channels=16)", ((1, 1, 32, 32, 32),)),
    Client("MedMamba", "MedMamba", "VSSM(depths=[2, 2, 2, 2], num_classes=6)"),
    Client("SSRS", "model.RS3Mamba", "RS3Mamba(pretrained=False)", ((1, 3, 256, 256),), ("RS3Mamba",)),
    Client(
        "Official_Remote_Sensing_Mamba",
        "rs_mamba_ss",
        f"RSM_SS(num_classes=2, {_SMALL}, dims=32)",
        folders=("semantic_segmentation_mamba",),
    ),
    Client(
        "ChangeMamba",
        "changedetection.models.Mamba_backbone",
        f"Backbone_VSSM({_SMALL}, dims=32, forward_type='v3noz')",
    ),
    Client(
        "ChangeMamba",
        "changedetection.models.Mamba_backbone",
        f"Backbone_VSSM({_SMALL}, dims=32, forward_type='v4noz')",
        force=True,
    ),
    Client("Sigma", "models.encoders.dual_vmamba", "vssm_tiny()", ((1, 3, 64, 64), (1, 3, 64, 64))),
    Client(
        "MambaIR",
        "basicsr.archs.mambair_arch",
        "MambaIR(embed_dim=32, depths=(2, 2), upsampler='pixelshuffle')",
        ((1, 3, 16, 16),),
    ),
    Client(
        "MambaIR",
        "basicsr.archs.mambairv2_arch",
        "MambaIRv2(depths=(2, 2), num_heads=(4, 4), upsampler='pixelshuffle')",
        ((1, 3, 16, 16),),
    ),
    Client("VMamba", "vmamba", f"VSSM({_SMALL}, dims=32, ssm_d_state=1, forward_type='v05_noz')"),
    Client("VMamba", "vmamba", f"VSSM({_SMALL}, dims=32, ssm_d_state=4, forward_type='v3')"),
    Client("VMamba", "models.vmamba", f"VSSM({_SMALL}, dims=32, forward_type='v0')", _IMAGE, _CLASSIFIER),
    Client(
        "VMamba",
        "models.vmamba",
        f"VSSM({_SMALL}, dims=32, ssm_d_state=1, forward_type='v05_noz')",
        _IMAGE,
        _CLASSIFIER,
        True,
    ),
    Client(
        "VMamba@fffd85b",
        "models.vmamba",
        f"VSSM({_SMALL}, dims=32, ssm_d_state=1, forward_type='v05_noz')",
        _IMAGE,
        _CLASSIFIER,
    ),
    Client(
        "VMamba@27bfb9f",
        "models.vmamba",
        f"VSSM({_SMALL}, dims=32, ssm_d_state=4, forward_type='v2')",
        _IMAGE,
        _CLASSIFIER,
    ),
    Client(
        "2DMamba",
        "models.vmamba",
        f"VSSM({_SMALL}, dims=32, ssm_d_state=1, forward_type='v05_noz', use_v2d=True)",
        _IMAGE,
        ("2DVMamba/classification",),
        True,
    ),
    Client("MSVMamba", "models.vmamba", f"VSSM({_SMALL}, dims=32)", _IMAGE, _CLASSIFIER),
    Client("LocalMamba", "lib.models.local_vmamba", f"VSSM({_SMALL}, dims=32)", _IMAGE, _CLASSIFIER),
    Client(
        "LocalMamba", "lib.models.local_vim", "VisionMamba(img_size=32, depth=2, embed_dim=64)", _IMAGE, _CLASSIFIER
    ),
    Client(
        "EfficientVMamba",
        "lib.models.mamba.efficient_mamba",
        f"EfficientVSSM({_SMALL}, dims=32)",
        ((2, 3, 128, 128),),
        _CLASSIFIER,
    ),
    Client("Spatial-Mamba", "models.spatialmamba", "SpatialMamba(depths=[1, 1, 2, 1], dims=16)", _IMAGE, _CLASSIFIER),
    Client(
        "PlainMamba",
        "plain_mamba_layer",
        "PlainMambaLayer(32, True, True, 0.0, {'d_state': 16, 'default_hw_shape': (8, 8)})",
        ((2, 64, 32), [8, 8]),
        ("mmcls/plain_mamba_dev/models/plain_mamba",),
    ),
    Client("Vim", "models_mamba", f"{_VIM}()", ((1, 3, 224, 224),), ("vim",)),
    Client("Vim", "models_mamba", f"{_VIM}()", ((1, 3, 224, 224),), ("vim", "mamba-1p1p1"), True),
    Client("VideoMamba", "videomamba", "VisionMamba(img_size=32, depth=4)", _IMAGE, ("videomamba/image_sm/models",)),
    Client(
        "VideoMamba",
        "videomamba",
        "VisionMamba(img_size=32, depth=4, num_frames=4)",
        ((1, 3, 4, 32, 32),),
        ("videomamba/video_sm/models",),
    ),
    Client(
        "zigma",
        "model_zigma",
        "ZigMa(4, 64, 2, 8, rms_norm=False, fused_add_norm=False, use_jit=False, device='cpu')",
        ((2, 4, 8, 8), (2,)),
    ),
    Client(
        "MambaVision",
        "mambavision.models.mamba_vision",
        "MambaVision(32, 32, [1, 1, 2, 2], [8, 8, 14, 7], 4, [2, 2, 4, 4])",
    ),
    Client("Mamba-YOLO", "ultralytics.nn.modules.mamba_yolo", "XSSBlock(32, 32)", ((2, 32, 16, 16),)),
    Client(
        "Swin-UMamba",
        "nnunetv2.nets.SwinUMambaD",
        "SwinUMambaD({'in_chans': 3, 'patch_size': 4, 'depths': [1, 1, 1, 1], 'dims': 32}, {'num_classes': 2, "
        "'deep_supervision': True, 'features_per_stage': [32, 64, 128, 256], 'drop_path_rate': 0.2, 'd_state': 16})",
        folders=("swin_umamba",),
    ),
    Client(
        "2025-CVPR-MaIR",
        "basicsr.archs.mair_arch",
        "MaIR(img_size=16, embed_dim=32, depths=(2, 2), scan_len=4, upsampler='pixelshuffle')",
        ((1, 3, 16, 16),),
    ),
    Client(
        "Wave-Mamba",
        "basicsr.archs.wavemamba_arch",
        "WaveMamba(in_chn=3, wf=16, n_l_blocks=[1, 1, 1], n_h_blocks=[1, 1, 1])",
        ((1, 3, 64, 64),),
    ),
    Client(
        "VmambaIR",
        "mamber32_arch",
        "Mamber32(dim=16, num_blocks=[1, 1, 1, 1], num_refinement_blocks=1)",
        ((1, 3, 32, 32),),
        ("Deraining/basicsr/models/archs",),
    ),
    Client(
        "VMRNN-PyTorch",
        "VMRNN_B",
        "VMRNN(img_size=16, patch_size=2, in_chans=1, embed_dim=32, depths=[2], drop_rate=0., attn_drop_rate=0., "
        "drop_path_rate=0.1)",
        ((2, 1, 16, 16), [None]),
        ("Moving_MNIST_VMRNN",),
    ),
    Client("SkinMamba", "models.SkinMamba", "SkinMamba()", ((2, 3, 64, 64),)),
    Client("msvm-unet", "model", "MSVMUNet(enc_name='tiny_0230s')", ((2, 3, 128, 128),), force=True),
    Client(
        "CDMamba",
        "models.CDMamba",
        "CDMamba(spatial_dims=2, in_channels=3, mode='AGLGF', conv_mode='orignal', up_mode='SRCM')",
        ((1, 3, 32, 32), (1, 3, 32, 32)),
    ),
    Client(
        "GroupMamba",
        "models.groupmamba",
        "GroupMamba(embed_dims=[32, 64, 64, 64], depths=[1, 1, 1, 1], stem_hidden_dim=16, distillation=False)",
        folders=_CLASSIFIER,
    ),
    Client(
        "TinyViM",
        "model.tinyvim",
        "TinyViM([1, 1, 1, 1], [16, 32, 48, 64], downsamples=[True] * 4, num_classes=5, distillation=False)",
        ((2, 3, 64, 64),),
    ),
    Client(
        "DAMamba",
        "models.DAMamba",
        "DAMamba(depths=(1, 1, 1, 1), dims=(24, 48, 96, 96), num_classes=5)",
        ((2, 3, 96, 96),),
        _CLASSIFIER,
    ),
    Client("A2Mamba", "models.a2mamba", "A2SSM(16)", ((2, 16, 8, 8),)),
    Client(
        "QuadMamba",
        "models.vmamba",
        f"VSSM({_SMALL}, dims=32, num_classes=5, ssm_d_state=4, forward_type='v3noz')",
        ((2, 3, 64, 64),),
        _CLASSIFIER,
    ),
    Client(
        "pixmamba",
        "models.vmamba",
        f"VSSM({_SMALL}, dims=32, num_classes=3, ssm_d_state=4, forward_type='v3_noz')",
        folders=_CLASSIFIER,
    ),
    Client(
        "ReMamber",
        "vmamba_model.vmamba",
        f"VSSM({_SMALL}, dims=32, num_classes=5, ssm_d_state=4, forward_type='v3noz')",
    ),
    Client(
        "SUM",
        "net.models.vmamba",
        f"VSSM({_SMALL}, depths_decoder=[1, 1, 1, 1], dims=[16, 32, 64, 128], dims_decoder=[128, 64, 32, 16], "
        "num_classes=1)",
        ((2, 3, 64, 64), (2, 4)),
    ),
    Client(
        "EM-Net",
        "models.em_net_model",
        f"EMNet(1, 3, {_SMALL}, feat_size=[16, 32, 32, 64], hidden_size=64, in_shpae=[32, 32, 32])",
        ((1, 1, 32, 32, 32),),
    ),
    Client(
        "LoG-VMamba",
        "mlpipeline.models.segmentation.swin_umamba.k1_modules_3d",
        "SS3DConv(16, conv_mode='full')",
        ((1, 6, 6, 6, 16),),
    ),
    Client("VMambaMorph", "vmamba", "VSSBlock(hidden_dim=16, d_state=16)", ((1, 216, 16),), ("mambamorph/torch",)),
    Client("Vivim", "modeling.vivim", "MambaLayer(16)", ((1, 16, 5, 8, 8),)),
    Client("Vivim", "modeling.vivim", "MambaLayer(16)", ((1, 16, 5, 8, 8),), (".", "mamba"), keep=True),
    Client("MambaHSI", "model.MambaHSI", "MambaHSI(in_channels=16, hidden_dim=16, num_classes=5)", ((1, 16, 16, 16),)),
    Client("UVM-Net", "net.uvmb", "UVMB(c=8, w=8, h=8)", ((1, 8, 8, 8),), ("Ultra",)),
    Client(
        "Samba",
        "Samba",
        "Samba(embed_dims=[16, 32, 64, 64], depths=[1, 1, 1, 1], stem_hidden_dim=8)",
        ((2, 3, 64, 64),),
        ("mmseg/models/backbones",),
    ),
    Client(
        "DiS",
        "models_dis",
        "DisModel(img_size=16, patch_size=2, embed_dim=64, channels=4, depth=4, num_classes=10)",
        ((2, 4, 16, 16), (2,), torch.tensor([1, 2])),
    ),
    Client("Mamba-Reg", "models_mamba", "VisionMamba(img_size=32, patch_size=8, embed_dim=64, depth=2, num_classes=5)"),
    Client(
        "ARM",
        "models_pretrain",
        "VisionMamba(img_size=192, patch_size=16, stride=16, embed_dim=64, depth=12)",
        ((1, 3, 192, 192),),
    ),
    Client("PointMamba", "models.point_mamba_scan", "MixerModel(32, 2)", ((2, 16, 32), (2, 16, 32))),
    Client("PointCloudMamba", "mamba_layer", "MambaBlock(16, 0, 'v2')", ((2, 16, 16),), ("openpoints/models/PCM",)),
    Client("Mamba3D", "modules.mamba_simple", "Mamba(16, bimamba_type='v2')", ((2, 9, 16),), ("models/bimamba_ssm",)),
    Client("MTMamba", "models.utils", "STMBlock(hidden_dim=16)", ((1, 8, 8, 16),)),
    Client(
        "Mamba_FETrack",
        "lib.models.mamba_fetrack.mamba_cross",
        "CrossMamba(16)",
        ((2, 320, 16),) * 3,
        ("Mamba_FETrack",),
    ),
    Client(
        "MambaClinix-PyTorch",
        "nnunetv2.nets.MambaClinix_3d",
        "MambaLayer(16, 16)",
        ((1, 16, 4, 4, 4),),
        ("mambaclinix",),
    ),
)

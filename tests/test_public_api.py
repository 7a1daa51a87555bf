"""The public names and their arguments. Whoever changes one edits api_surface.txt too, and so knows it.

Run this file as a script to write the inventory anew.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import kan_mamba_layers
from kan_mamba_layers import ops

INVENTORY = Path(__file__).with_name("api_surface.txt")


def arguments(function: object) -> str:
    """Names and defaults, without annotations, whose text differs between versions of Python."""
    signature = inspect.signature(function)  # type: ignore[arg-type]
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    text = []
    for p in bare:
        default = p.default
        shown = p.replace(default=p.empty) if default is not p.empty else p
        name = getattr(default, "__qualname__", repr(default))
        text.append(str(shown) if default is p.empty else f"{shown}={name}")
        if p.kind is p.KEYWORD_ONLY and not any(t == "*" or t.startswith("*") for t in text):
            text.insert(-1, "*")
    return ", ".join(text)


def surface() -> list[str]:
    """One line for every public name and every public method that the package itself defines."""
    lines = []
    for name in sorted(set(kan_mamba_layers.__all__)):
        value = getattr(kan_mamba_layers, name)
        if inspect.ismodule(value):
            lines += [f"{name}.{inner}({arguments(getattr(value, inner))})" for inner in sorted(value.__all__)]
            continue
        if not callable(value):
            lines.append(name)
            continue
        lines.append(f"{name}({arguments(value)})")
        if inspect.isclass(value):
            own = [cls for cls in value.__mro__ if cls.__module__.startswith("kan_mamba_layers")]
            methods = {m for cls in own for m in vars(cls) if not m.startswith("_")} - {"register_parameter"}
            for method in sorted(methods):
                if callable(getattr(value, method)):
                    lines.append(f"{name}.{method}({arguments(getattr(value, method))})")
    return lines


def test_inventory() -> None:
    assert surface() == INVENTORY.read_text().splitlines(), "run `python tests/test_public_api.py` if this is meant"


def test_names_of_the_contract() -> None:
    assert set(kan_mamba_layers.__all__) - {"__version__"} == {
        *("selective_scan", "cross_selective_scan", "bspline_basis", "kan_linear", "resolve"),
        *("KANLinear", "KANConv2d", "KANLayer", "KANBlock", "SS2D", "SS3D", "Mamba", "VSSBlock", "EMA", "param_groups"),
        *("KMUNet", "KMUNetPP", "VMamba", "VMambaUNet"),
        *("create_model", "list_models", "from_pretrained", "convert_state_dict", "export_onnx"),
        *("list_pretrained", "Segmenter"),
        "walks",
        *("effective_receptive_field", "scan_attention"),
    }
    for name in ("selective_scan", "cross_selective_scan", "bspline_basis", "kan_linear", "resolve"):
        assert getattr(ops, name) is getattr(kan_mamba_layers, name)
    assert hasattr(ops, "Backend")


def test_version() -> None:
    parts = kan_mamba_layers.__version__.split(".")
    assert len(parts) == 3 and all(part.isdigit() for part in parts)


def test_every_public_name_is_documented() -> None:
    for name in kan_mamba_layers.__all__:
        value = getattr(kan_mamba_layers, name)
        if not callable(value):
            continue
        text = inspect.getdoc(value)
        assert text and len(text) > 100, name
        for method in surface():
            if method.startswith(f"{name}.") and not method.startswith(f"{name}.extra_repr("):
                attribute = getattr(value, method.split("(")[0].split(".")[1])
                assert inspect.getdoc(attribute), method


def test_arguments_after_the_sizes_are_keyword_only() -> None:
    """The order of options is no promise; sizes and the options that other libraries pass by position are."""
    positional = {
        "KANLinear": ["in_features", "out_features", "bias"],
        "KANConv2d": ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias"],
        "KANLayer": ["in_features", "hidden_features", "out_features"],
        "KANBlock": ["dim"],
        "SS2D": ["d_model", "d_state", "d_conv", "expand", "dt_rank"],
        "SS3D": ["d_model", "d_state", "d_conv", "expand", "dt_rank"],
        "Mamba": ["d_model", "d_state", "d_conv", "expand", "dt_rank"],
        "VSSBlock": ["dim"],
        "EMA": ["channels", "factor"],
        "KMUNet": ["in_channels", "num_classes"],
        "KMUNetPP": ["in_channels", "num_classes"],
        "VMamba": ["in_channels", "num_classes"],
        "VMambaUNet": ["encoder", "in_channels", "num_classes"],
    }
    for name, expected in positional.items():
        parameters = inspect.signature(getattr(kan_mamba_layers, name)).parameters.values()
        assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == expected, name


if __name__ == "__main__":
    INVENTORY.write_text("\n".join(surface()) + "\n")

"""A constructor's arguments, captured and passed on by name."""

from __future__ import annotations

from typing import Any

from kan_mamba_layers.layers.arguments import options_for, own_arguments


class Inner:
    def __init__(self, size: int, *, scale: float = 1.0, name: str = "") -> None:
        self.options = (size, scale, name)


class Outer:
    arguments: dict[str, Any]

    def __init__(self, size: int, depth: int = 2, *, scale: float = 3.0, other: bool = True) -> None:
        super().__setattr__("arguments", own_arguments(locals()))  # `super` adds __class__ to the scope
        self.inner = Inner(size, **options_for(Inner, self.arguments))


def test_own_arguments_are_those_of_the_signature_in_order() -> None:
    assert list(Outer(5, scale=4.0).arguments.items()) == [("size", 5), ("depth", 2), ("scale", 4.0), ("other", True)]


def test_only_common_keywords_are_passed_on() -> None:
    assert Outer(5, other=False).inner.options == (5, 3.0, "")

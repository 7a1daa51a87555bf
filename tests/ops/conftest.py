"""What the tests of all ops share."""

import os
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest

LANGUAGES = {"triton.language", "triton.language.core"}


@pytest.fixture(scope="session", autouse=True)
def language_patched_once() -> Iterator[None]:
    """Patch Triton's language once per process: its interpreter does so at every call of a device function anew.

    That takes a third of the time of these tests.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    interpreter = import_module("triton.runtime.interpreter")
    patch, done = interpreter._patch_lang, {}

    def patch_once(function: Any) -> Any:
        key = frozenset(LANGUAGES.intersection(getattr(v, "__name__", "") for v in function.__globals__.values()))
        if key not in done:
            done[key] = patch(function)
        return type(done[key])()  # an empty scope, with nothing to restore

    interpreter._patch_lang = patch_once
    yield
    interpreter._patch_lang = patch

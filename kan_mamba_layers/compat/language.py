"""Names for language models that vision code imports from ``mamba_ssm.utils`` and never uses."""

from typing import Any, NoReturn


def _refuse(name: str) -> NoReturn:
    raise NotImplementedError(
        f"{name} is for language models, which kan_mamba_layers.compat does not serve; install mamba_ssm itself"
    )


class GenerationMixin:
    """Stand in for the base class of language models, without text generation."""

    def generate(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise NotImplementedError."""
        _refuse("generate")


def load_config_hf(model_name: str) -> NoReturn:
    """Raise NotImplementedError."""
    _refuse("load_config_hf")


def load_state_dict_hf(model_name: str, device: Any = None, dtype: Any = None) -> NoReturn:
    """Raise NotImplementedError."""
    _refuse("load_state_dict_hf")

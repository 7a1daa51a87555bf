"""``python -m kan_mamba_layers.compat``."""

from kan_mamba_layers.compat import main

if __name__ == "__main__":
    main()

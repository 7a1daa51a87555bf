"""Data sets as people download them, one module per format."""

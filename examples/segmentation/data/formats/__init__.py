"""Data sets as people download them, one module a format."""

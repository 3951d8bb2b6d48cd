"""The algorithms: one file each, both halves in it. Installed as `fedfuse.strategies`."""

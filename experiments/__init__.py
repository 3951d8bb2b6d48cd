"""Hydra presets and studies, each with the command that made its results."""

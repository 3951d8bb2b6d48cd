"""A cellar for every touch of a private name of Flower, Ray or torch: why, what it buys, and what happens without it.

It imports nothing of the platform but errors.
"""

"""The cellar: each touch of a private name of Flower, Ray or torch, with what it buys and how to go on without it.

It may import those libraries and `fedfuse.errors`, and nothing else of FedFuse; `tests/compat` has a guard for each
name, and proves that no other room touches one.
"""

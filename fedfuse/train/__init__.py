"""Local training: loops over rows, optimisers, losses and objectives, adapters, differential privacy.

It may import `models`, `data` and what is below them; it knows no client and no round.
"""

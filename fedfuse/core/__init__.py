"""A round: both halves of a strategy, shares, what goes out and comes in, the node, the loop, evaluation, the scenario.

It may import `train` and what is below it, and knows neither where clients run nor where a run is kept.
"""

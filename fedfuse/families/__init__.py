"""What several strategies share: averaging, parts of a model, adapters, a student at the server, Flower's own rules.

It may import `core`, the grid base of `engines` and what is below them; it names no strategy.
"""

"""Where simulated clients run: the grid base, this process, Ray's actors, and apps of Flower's that know nothing of us.

It may import `core` and what is below it, and knows nothing of run directories.
"""

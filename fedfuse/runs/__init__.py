"""One run, and many: experiment, run directory, checkpoint, trackers, export, preview, sweep, search, parallel runs.

It puts everything below together and may import every room but deploy and bench.
"""

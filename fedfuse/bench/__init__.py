"""What `fedfuse bench` runs: workloads, the sides that play them, and what whole commands cost.

It stands on top and may import every room but `deploy`; nothing but the command line imports it.
"""

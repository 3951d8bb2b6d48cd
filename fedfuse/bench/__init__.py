"""What `fedfuse bench` runs: workloads, the sides that play them, and what whole commands cost."""

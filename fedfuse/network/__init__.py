"""A deployed run's two ends: the server's grid over Flower's, the site, their handshake, a site's policy and its data.

It may import `engines`, `core` and what is below them; whoever starts processes or keeps a run stands above it.
"""

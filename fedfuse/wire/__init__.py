"""Arrays on the wire: records, layouts, hashes, sums over fixed groups, knowledge, traffic, codecs, client store.

It knows neither clients nor rounds, and may import `config`, `compat` and `errors`.
"""

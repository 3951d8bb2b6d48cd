"""Arrays on the wire: records, layouts, hashes, sums over fixed groups, knowledge, traffic, codecs, client store.

It stands at the ground beside `config`, knows neither clients nor rounds, and may import `compat` and `errors`.
"""

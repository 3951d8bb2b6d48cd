"""What a run may be told: schema, composition, registry, catalogue of names, what a message's configuration may say.

It stands at the ground: it imports `fedfuse.errors` and nothing else of FedFuse, so that asking what there is costs
nothing.
"""

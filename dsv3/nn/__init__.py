"""Layers: for each a `Params` NamedTuple, `specs`, and an `apply`."""

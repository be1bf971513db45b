"""The aggregator: a locked-away Flower SuperLink, its dispatcher and the round loop."""

__version__ = "0.1.0"

"""The aggregator: a locked-away Flower SuperLink, its dispatcher and the round loop."""

"""A minimal Flower app, made as Flower's own examples are."""

"""The hospital's side: resident Flower node, warm trainer, tasks and command line."""

__version__ = "0.1.0"

"""The hospital's side: resident Flower node, warm trainer, tasks and command line."""

"""Unpacked by Flower into FLWR_HOME and imported from there; holds no logic of its own."""

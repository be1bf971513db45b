"""Flower demands a ClientApp in every bundle; a hospital never fetches, nor runs, this one."""

from flwr.clientapp import ClientApp

app = ClientApp()

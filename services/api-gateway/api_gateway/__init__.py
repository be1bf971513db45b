"""The control plane: accounts, sites, studies, requests, consents, runs, model versions and the event log."""

__version__ = "0.1.0"

"""The control plane: accounts, sites, studies, requests, consents, runs, model versions and the event log."""

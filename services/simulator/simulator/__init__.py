"""Federated studies on one machine: the deployment's own rounds, strategies, checks and tasks, with no service running."""

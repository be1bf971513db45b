"""The coordinator's command line, `medhive-admin`: a client of the gateway's HTTP API like any other."""

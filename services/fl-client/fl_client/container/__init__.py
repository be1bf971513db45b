"""The hospital's container: its arguments, its environment, its exit codes and its health, around `medhive-site`."""

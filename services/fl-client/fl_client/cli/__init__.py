"""The hospital's command line, `medhive-site`: thin over the package's modules, which print nothing."""

"""The one Flower app that MedHive's superexec starts: thin on purpose, so that its hash changes with nothing but itself."""

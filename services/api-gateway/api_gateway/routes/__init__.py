"""The HTTP face of the services: one file a noun, each endpoint a unit of work and one call."""

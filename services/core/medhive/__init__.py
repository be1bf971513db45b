"""The shared language of MedHive: what every service agrees on, with no service in it."""

__version__ = "0.1.0"

"""The causes of refusals that only this service knows; the core has the others."""

from medhive.errors import MedHiveError


class TooManyAttempts(MedHiveError):
    """Somebody tries too often."""

    code = "too-many-attempts"


class Unavailable(MedHiveError):
    """The gateway is at its limit, on its way down, or without its database."""

    code = "unavailable"

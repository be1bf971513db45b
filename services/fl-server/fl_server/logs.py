"""How this service's processes log: JSON lines on standard error, with fixed event names.

An event that people follow carries a `text`: `medhive-server serve` prints those of its runs on standard output.
"""

import logging
import sys

import structlog


def log_json() -> None:
    """Write structured logs as JSON lines; tracebacks are plain text, without the values of variables."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        # A line and its end in one write: several processes share this stream.
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )

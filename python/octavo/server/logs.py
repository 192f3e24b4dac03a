"""The server's log: one line for each event, JSON for machines or text for people."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone
from typing import Any

_FIELDS = "octavo_fields"


def log_event(logger: logging.Logger, level: int, event: str, **fields: Any) -> None:
    """Log an event with its fields; those that are None are left out."""
    if logger.isEnabledFor(level):
        known = {name: value for name, value in fields.items() if value is not None}
        logger.log(level, event, extra={_FIELDS: known})


class JsonFormatter(logging.Formatter):
    """{"time": …, "level": …, "logger": …, "event": …, fields …} in one line."""

    def format(self, record: logging.LogRecord) -> str:
        """One line of JSON, whatever the record holds."""
        when = datetime.fromtimestamp(record.created, timezone.utc)
        entry: dict[str, Any] = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, _FIELDS, {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class TextFormatter(logging.Formatter):
    """12:34:56 event name=value …"""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and a traceback behind it where there is one."""
        fields = getattr(record, _FIELDS, {})
        # An id or a path comes from the client: repr keeps control characters off the terminal.
        parts = [f"{name}={value!r}" for name, value in fields.items()]
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        clock = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        line = " ".join([f"{clock} {level}{record.getMessage()}", *parts])
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def set_up_logging(log_format: str) -> None:
    """Send octavo's and uvicorn's logs to stderr; log_format "auto" is text on a terminal."""
    is_text = log_format == "text" or (log_format == "auto" and sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TextFormatter() if is_text else JsonFormatter())
    for name in ("octavo", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO if name == "octavo" else logging.WARNING)
        logger.propagate = False

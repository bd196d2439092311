"""What the log looks like: lines for a person, or one JSON object for each event."""

from __future__ import annotations

import datetime
import json
import logging
import sys
from typing import Any

FORMATS = ("text", "json")

# What every record has; what else there is on one was given as a field.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


def configure(level: str, log_format: str) -> None:
    """Logs to stderr. log_format: one of FORMATS."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter()
        if log_format == "json"
        else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
    logging.basicConfig(level=level.upper(), handlers=[handler])
    # Python's warnings would be lines of another kind.
    logging.captureWarnings(log_format == "json")


class JsonFormatter(logging.Formatter):
    """One event, one line: time (UTC), level, logger, message, the event's fields, and where an exception came from."""

    def format(self, record: logging.LogRecord) -> str:
        """A JSON object without a newline. A field whose type JSON does not have becomes a string."""
        event: dict[str, Any] = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc).isoformat(
                timespec="milliseconds"
            ),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        event.update((name, value) for name, value in vars(record).items() if name not in _STANDARD)
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return json.dumps(event, default=str, ensure_ascii=False)

"""Everything that Foreword raises on purpose.

    ForewordError
    ├── ConfigError          an option or a configuration file that cannot be used
    ├── DataError            rows, columns or data sets that cannot be used
    ├── MissingPackage       an optional package that is not installed
    ├── ModelNotFound        a base model that cannot be found or fetched
    ├── UnsupportedModel     a base model whose attention cannot be prefixed
    ├── EngineStopped        an engine that takes no more requests
    ├── PrefixError
    │   ├── PrefixFormatError    a prefix folder that is damaged or not a prefix
    │   └── PrefixMismatch       a prefix made for another base model or geometry
    ├── QueueFull            too many requests wait already
    ├── RunError             a run folder that cannot be used or resumed
    ├── StorageError         the disk refused: no space, no permission
    └── StoreError           a prefix store, or a name in it, that cannot be used

A message is one line of three parts: what was got, what was expected, what to do.
"""

__all__ = [
    "ConfigError",
    "DataError",
    "EngineStopped",
    "ForewordError",
    "MissingPackage",
    "ModelNotFound",
    "PrefixError",
    "PrefixFormatError",
    "PrefixMismatch",
    "QueueFull",
    "RunError",
    "StorageError",
    "StoreError",
    "UnsupportedModel",
]


class ForewordError(Exception):
    """Base of all errors that a user can cause and mend."""

    def __init__(self, got: str, expected: str = "", action: str = "") -> None:
        self.got, self.expected, self.action = got, expected, action
        message = got if not expected else f"{got}; expected {expected}"
        super().__init__(message if not action else f"{message}; {action}")


class ConfigError(ForewordError):
    """An option or a configuration file that cannot be used."""


class DataError(ForewordError):
    """Rows, columns or data sets that cannot be used."""


class MissingPackage(ForewordError):
    """An optional package that is not installed."""


class ModelNotFound(ForewordError):
    """A base model that cannot be found or fetched."""


class UnsupportedModel(ForewordError):
    """A base model whose attention cannot be prefixed."""


class PrefixError(ForewordError):
    """A prefix that cannot be used."""


class PrefixFormatError(PrefixError):
    """A prefix folder that is damaged or not a prefix."""


class PrefixMismatch(PrefixError):
    """A prefix made for another base model or geometry."""


class RunError(ForewordError):
    """A run folder that cannot be used or resumed."""


class StorageError(ForewordError):
    """The disk refused: no space left, no permission."""


class StoreError(ForewordError):
    """A prefix store, or a name in it, that cannot be used."""


class EngineStopped(ForewordError):
    """An engine that takes no more requests."""


class QueueFull(ForewordError):
    """Too many requests wait; after `retry_after_seconds` there may be room."""

    def __init__(self, waiting: int, retry_after_seconds: float) -> None:
        self.retry_after_seconds = max(1.0, retry_after_seconds)
        action = f"try again in {self.retry_after_seconds:.0f} s"
        super().__init__(f"{waiting} requests wait", "room in the queue", action)

"""Everything that Foreword raises on purpose.

    ForewordError
    ├── ConfigError          an option or a configuration file that cannot be used
    ├── DataError            rows, columns or data sets that cannot be used
    ├── MissingPackage       an optional package that is not installed
    ├── ModelNotFound        a base model that cannot be found or fetched
    ├── UnsupportedModel     a base model whose attention cannot be prefixed
    ├── PrefixError
    │   ├── PrefixFormatError    a prefix folder that is damaged or not a prefix
    │   └── PrefixMismatch       a prefix made for another base model or geometry
    ├── RunError             a run folder that cannot be used or resumed
    └── StorageError         the disk refused: no space, no permission

A message is one line of three parts: what was got, what was expected, what to do.
"""

__all__ = [
    "ConfigError",
    "DataError",
    "ForewordError",
    "MissingPackage",
    "ModelNotFound",
    "PrefixError",
    "PrefixFormatError",
    "PrefixMismatch",
    "RunError",
    "StorageError",
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

"""Every error a user can cause. Each message says what is wrong, where it was set, and what to do.

The command line prints a KitaeError as one line without a traceback and leaves with its exit code.
"""

from __future__ import annotations


class KitaeError(Exception):
    """Base of the errors kitae raises on purpose."""

    exit_code = 2


class ConfigError(KitaeError, ValueError):
    """A setting is unknown, mistyped, without effect, or contradicts another."""


class DataError(KitaeError, ValueError):
    """Rows that cannot be read or taught; the text names file, line and reason."""


class ModelError(KitaeError):
    """A model, adapter, tokenizer or template that cannot be loaded as asked."""


class PlanError(KitaeError):
    """The run does not fit the machine: memory, disk, or how work is laid over ranks."""


class EndpointError(KitaeError):
    """A model behind an address that refuses, cannot be reached, or fails again and again."""


class RewardError(KitaeError):
    """A reward function that is missing, has the wrong signature, or failed."""


class RunDirError(KitaeError):
    """An output directory that cannot be used: not empty, read-only, full, or not a run."""


class CheckpointError(KitaeError):
    """No checkpoint that can be resumed, or one that belongs to other settings."""


class MissingExtraError(KitaeError):
    """A feature whose optional package is not installed; the text holds the pip command."""


class NonFiniteError(KitaeError):
    """A loss, gradient, reward or log-probability that is NaN or infinite; no update was made."""

    exit_code = 70


class GateError(KitaeError):
    """An export that says something else than what it was made of."""

    exit_code = 3


class PortError(KitaeError):
    """An address that a server cannot listen on."""

    exit_code = 69


class LockedError(KitaeError):
    """Another process is running in this output directory."""

    exit_code = 75


class StoppedError(KitaeError):
    """The run was stopped by a signal; the text says what was saved and how to go on."""

    def __init__(self, message: str, *, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number

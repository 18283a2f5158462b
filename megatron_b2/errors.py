"""Errors shown to users. Each message names the offending value and says how to fix it."""

from __future__ import annotations

from collections.abc import Sequence


class B2Error(Exception):
    """Base class: the command line prints the message without a traceback and exits 2."""


class ConfigError(B2Error, ValueError):
    """The configuration is wrong. Carries every problem found, not only the first."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        if len(self.problems) == 1:
            message = self.problems[0]
        else:
            lines = "\n".join(f"  {i}. {problem}" for i, problem in enumerate(self.problems, 1))
            message = f"{len(self.problems)} configuration errors:\n{lines}"
        super().__init__(message)


class InputError(B2Error, ValueError):
    """An input record, corpus file or argument is malformed."""


class OutputError(B2Error, RuntimeError):
    """An output cannot be written: the disk refuses it, or something is in its place."""


class DataError(B2Error, ValueError):
    """A tokenized data set (.bin/.idx, manifest) is damaged or does not fit the run."""


class TokenizerError(B2Error, ValueError):
    """A tokenizer file is missing, damaged or does not fit."""


class CheckpointError(B2Error, RuntimeError):
    """A checkpoint is damaged, incomplete, does not fit, or could not be written."""


class NonFiniteError(B2Error, FloatingPointError):
    """Loss or gradients are NaN or infinite."""


class LaunchError(B2Error, RuntimeError):
    """The launch environment (ranks, SLURM variables, world size) is inconsistent."""

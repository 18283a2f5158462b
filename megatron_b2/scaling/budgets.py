"""Token budgets of a ladder: the same number for every size, or a number for each parameter."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from megatron_b2.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How many tokens a run of the ladder sees."""

    amount: float
    per_parameter: bool
    """`amount` is tokens for each parameter (the N of Table 10); else it is tokens."""

    @classmethod
    def parse(cls, text: str) -> Budget:
        """`1e12` is tokens, `20x` is tokens for each parameter. Raises InputError for anything else."""
        if not re.fullmatch(r"\d+(\.\d*)?([eE]\+?\d+)?x?", text):
            raise InputError(
                f"--budget {text!r}: write tokens, as 1e12, or tokens for each parameter, as 20x"
            )
        amount = float(text.removesuffix("x"))
        if not 0 < amount < math.inf:
            raise InputError(f"--budget {text!r}: must be positive")
        return cls(amount=amount, per_parameter=text.endswith("x"))

    def tokens(self, num_parameters: int) -> float:
        """Tokens for a model of so many parameters."""
        return self.amount * num_parameters if self.per_parameter else self.amount

    def __str__(self) -> str:
        """As `parse` reads it."""
        return f"{number(self.amount)}{'x' if self.per_parameter else ''}"


def number(value: float) -> str:
    """A number in few characters, fit for names of files: 1e12, 2.5e11, 1638400."""
    text = f"{value:.4g}"
    return text.replace("e+", "e") if "e" in text else text

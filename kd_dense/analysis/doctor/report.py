"""What an examination found: checks with facts and sentences, as an exit code and as strict JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PASSED, WARNING, FAILED, SKIPPED = 'passed', 'warning', 'failed', 'skipped'


@dataclass
class Check:
    """One thing that was looked at.

    Args:
        name: short name, the key of its facts.
        facts: what was found; plain data.
        failures: one sentence each, with the config key or file and what to do.
        warnings: likewise, for what may be meant.
        skipped: why it could not be looked at; ``None``: it was.
    """

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    skipped: str | None = None

    @property
    def status(self) -> str:
        """``'passed'``, ``'warning'``, ``'failed'`` or ``'skipped'``."""
        if self.skipped is not None:
            return SKIPPED
        return FAILED if self.failures else WARNING if self.warnings else PASSED

    @property
    def usable(self) -> bool:
        """Can checks build on this one?"""
        return self.status in (PASSED, WARNING)

    def fail(self, sentence: str) -> None:
        """Something is wrong."""
        self.failures.append(_one_line(sentence))

    def warn(self, sentence: str) -> None:
        """Something may be wrong."""
        self.warnings.append(_one_line(sentence))


@dataclass
class Report:
    """All checks of an examination, in the order in which they were made."""

    config: str
    toolbox: str
    checks: list[Check] = field(default_factory=list)

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    @property
    def failures(self) -> list[str]:
        """All sentences about what is wrong."""
        return [sentence for check in self.checks for sentence in check.failures]

    @property
    def warnings(self) -> list[str]:
        """All sentences about what may be wrong."""
        return [sentence for check in self.checks for sentence in check.warnings]

    @property
    def exit_code(self) -> int:
        """0 when nothing failed, else 1."""
        return 1 if self.failures else 0

    @property
    def verdict(self) -> str:
        """The last line of the output."""
        failed = [check.name for check in self.checks if check.status == FAILED]
        warned = len(self.warnings)
        tail = f', {warned} warning{"s" if warned > 1 else ""}' if warned else ''
        if not failed:
            return f'doctor: all checks passed{tail}'
        return f'doctor: {len(failed)} check{"s" if len(failed) > 1 else ""} failed: {", ".join(failed)}{tail}'

    def to_json(self) -> str:
        """Everything as strict JSON: numbers that are not finite are ``null``."""
        content = {
            'config': self.config,
            'toolbox': self.toolbox,
            'exit_code': self.exit_code,
            'verdict': self.verdict,
            'failures': self.failures,
            'warnings': self.warnings,
            'checks': {
                check.name: {
                    'status': check.status,
                    'failures': check.failures,
                    'warnings': check.warnings,
                    'skipped': check.skipped,
                    'facts': _finite(check.facts),
                }
                for check in self.checks
            },
        }
        return json.dumps(content, indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def _one_line(text: str) -> str:
    return ' '.join(str(text).split())

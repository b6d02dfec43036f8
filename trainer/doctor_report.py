"""What `planaria doctor` found: facts, and checks that passed, failed or could not be made."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["ok", "failed", "not checked"]
_SHOWN = 12  # findings of one check that are printed; the JSON has all


@dataclass(frozen=True)
class Finding:
    """One result of one check.

    Attributes:
        where: layer, expert or tensor, e.g. ``L01.E003.up_proj``; "" for the whole model.
        text: what was seen.
        remedy: what to do, for a failure.
    """

    check: str
    state: State
    text: str
    where: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        where = f"{self.where}: " if self.where else ""
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.state:<12}{self.check:<15}{where}{self.text}{remedy}"


@dataclass
class Report:
    model: str
    facts: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def fact(self, name: str, value: Any) -> None:
        self.facts[name] = value
        shown = "; ".join(map(str, value)) if isinstance(value, list) else value
        print(f"{name:<27}{shown}", flush=True)

    def failed(self, check: str, where: str, text: str, remedy: str) -> None:
        self._add(Finding(check, "failed", text, where, remedy))

    def skipped(self, check: str, why: str) -> None:
        self._add(Finding(check, "not checked", why))

    def passed(self, check: str, text: str) -> None:
        """Note that ``check`` is done; it passed unless it failed somewhere."""
        failures = self.has_failed(check)
        if failures > _SHOWN:
            print(f"            {check:<15}and {failures - _SHOWN} more", flush=True)
        if not failures:
            self._add(Finding(check, "ok", text))

    def _add(self, finding: Finding) -> None:
        if finding in self.findings:  # a recipe's model is looked at twice
            return
        self.findings.append(finding)
        if Counter(f.check for f in self.findings)[finding.check] <= _SHOWN or finding.state != "failed":
            print(finding, flush=True)

    def has_failed(self, check: str) -> int:
        """How many findings of ``check`` are failures."""
        return sum(finding.check == check and finding.state == "failed" for finding in self.findings)

    @property
    def ok(self) -> bool:
        return not any(finding.state == "failed" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "ok": self.ok,
            "facts": self.facts,
            "findings": [vars(finding) for finding in self.findings],
        }

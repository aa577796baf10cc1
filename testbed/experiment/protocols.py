"""Protocols of evaluation as presets: how published results were measured, as data.

A run stores every scoring mode of every answer, so a protocol does not change how answers are judged. It chooses how the model is
asked, which probes ask besides, how many edits make a step, and which metrics its table shows; one run can print several tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ProtocolName = Literal["published", "wild"]


@dataclass(frozen=True)
class Protocol:
    """One preset.

    summary: title of its table, with how answers count. source: the papers. prompt: the form in which a text model is asked. defaults:
        other fields of a run that it gives where the command line leaves them out. also: probes that it needs. metrics: rows of its
        table, as summary.json names them (the end of a name is its scoring mode, docs/semantics.md).
    """

    summary: str
    source: str
    prompt: str
    also: tuple[str, ...]
    metrics: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def stored(self) -> dict[str, Any]:
        """The manifest's entry, from which the analysis prints the table."""
        return {"summary": self.summary, "source": self.source, "metrics": list(self.metrics)}


PROTOCOLS: Mapping[ProtocolName, Protocol] = {
    "published": Protocol(
        summary="as published: given answers scored under teacher forcing",
        source="ROME, MEMIT and AlphaEdit (arXiv 2202.05262, 2210.07229, 2410.02355): CounterFact and zsRE, 100 edits a step in AlphaEdit",
        prompt="bare",
        also=("generation",),
        metrics=(
            *("edit_success_now", "edit_success", "text_generality", "locality_hard", "locality_text", "portability"),
            *("efficacy_score", "paraphrase_score", "neighbourhood_score", "counterfact_score", "generation_entropy", "reference_score"),
        ),
        defaults={"batch": 100},
    ),
    "wild": Protocol(
        summary="WILD: free generation with natural stop, without context and behind the instruction to answer a question",
        source="The Mirage of Model Editing (arXiv 2502.11177)",
        prompt="bare",
        also=("qa-prompt",),
        metrics=(
            *("edit_success_now_gen", "edit_success_gen", "edit_success_contains", "text_generality_gen", "text_generality_contains"),
            *("qa_success_gen", "qa_success_contains", "qa_generality_gen", "qa_generality_contains"),
            *("locality_hard_gen", "locality_far_gen", "locality_text_gen"),
        ),
    ),
}


def probes_of(names: Iterable[ProtocolName]) -> tuple[str, ...]:
    """The probes that these protocols need besides the usual ones, each once."""
    return tuple(dict.fromkeys(probe for name in names for probe in PROTOCOLS[name].also))


def prompt_of(names: Iterable[ProtocolName]) -> str | None:
    """The form of prompts of these protocols; None without any, and where they differ, which `departures` then shows."""
    found = {PROTOCOLS[name].prompt for name in names}
    return found.pop() if len(found) == 1 else None


def defaults_of(names: Iterable[str]) -> dict[str, Any]:
    """The fields that these protocols give to a run whose command line leaves them out; an unknown name gives none."""
    known = {str(name): protocol for name, protocol in PROTOCOLS.items()}
    return {field: value for name in names if name in known for field, value in known[name].defaults.items()}


def departures(names: Iterable[ProtocolName], fields: Mapping[str, Any]) -> list[str]:
    """A line for each field of a run in which it departs from a protocol."""
    wanted = [(n, {"prompt": PROTOCOLS[n].prompt, **PROTOCOLS[n].defaults}) for n in names]
    return [f"--{f} {fields[f]} departs from the protocol {n} ({v})" for n, own in wanted for f, v in own.items() if fields[f] != v]

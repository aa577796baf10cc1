"""Concepts: the question whether an instance belongs to one."""

from __future__ import annotations

DEMONSTRATIONS = "Whether a robin belongs to category bird? Yes\nWhether a hammer belongs to category bird? No\n"
"""Two answered questions, which show the form of the answer."""


def membership(instance: str, concept: str) -> str:
    """The question whether an instance belongs to a concept, behind two answered ones.

    Source of the form: Wang et al. 2024 (ConceptEdit, arXiv 2403.06259), whose demonstrations are others.
    """
    return f"{DEMONSTRATIONS}Whether {instance} belongs to category {concept}?"

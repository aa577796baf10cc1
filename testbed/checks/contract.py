"""What all checks share: a requirement with a sentence, and the outcome of a check."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from testbed.experiment.command import user_errors


class CheckFailed(AssertionError):
    """A class breaks its contract; the message says what was expected and what was found."""


def require(holds: Any, message: str) -> None:
    """Raise `CheckFailed` with the message unless the condition holds."""
    if not holds:
        raise CheckFailed(message)


@contextmanager
def refused(kind: type[Exception], words: str):
    """The block must raise an error of this kind whose message holds these words."""
    try:
        yield
    except kind as e:
        require(words in str(e), f"the {kind.__name__} must say {words!r}; it says {str(e)!r}")
    else:
        raise CheckFailed(f"a {kind.__name__} that says {words!r} was expected, and nothing was raised")


@dataclass(frozen=True)
class Outcome:
    """One check of one class: `problem` is "" where it passed, else the reason."""

    subject: str
    check: str
    problem: str = ""


def title(check: Callable[..., Any]) -> str:
    """The name of a check as words: `an_empty_batch_is_the_identity` reads "an empty batch is the identity"."""
    return check.__name__.replace("_", " ")


def outcome(subject: str, what: str, check: Callable[[], Any]) -> Outcome:
    """Run a check. An error of another kind than a failed requirement is named with the line of the plug-in that raised it."""
    try:
        check()
    except CheckFailed as e:
        return Outcome(subject, what, str(e))
    except user_errors() as e:
        return Outcome(subject, what, f"{type(e).__name__}: {e}")
    except Exception as e:
        last = traceback.extract_tb(e.__traceback__)[-1]
        return Outcome(subject, what, f"{type(e).__name__}: {e} ({last.filename}, line {last.lineno})")
    return Outcome(subject, what)

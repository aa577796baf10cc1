# pyright: strict
"""Variants: an editor and its own settings in one name, `alphaedit[projector=false,layers=0,1]`.

The whole text is the editor's name in records and tables, so one run can compare several settings of one method.
Settings in brackets override the `--set` fields of the editor, which hold for all of its variants.
"""

from __future__ import annotations

import re

_FORM = re.compile(r"(?P<base>[^\[\]]+)\[(?P<settings>[^\[\]]*)\]")
_OUTSIDE = re.compile(r",(?![^\[]*\])")


def names(text: str) -> list[str]:
    """The items of a comma-separated list; a comma inside brackets belongs to its item."""
    return [part.strip() for part in _OUTSIDE.split(text)]


def split(name: str) -> tuple[str, dict[str, str]]:
    """The name of the editor, and the fields that its brackets set (none without brackets).

    A part without an equals sign continues the value before it: `layers=0,1`. Raises ValueError for a name that is not
    of the form `editor[field=value,...]`.
    """
    if "[" not in name and "]" not in name:
        return name, {}
    form = _FORM.fullmatch(name)
    if form is None:
        raise ValueError(f"{name!r} is not of the form editor[field=value,...]; the brackets stand last, behind any +wrapper")
    settings: dict[str, str] = {}
    field = ""
    for part in form["settings"].split(","):
        left, equals, value = part.partition("=")
        if equals and left.strip() and left.strip() not in settings:
            field = left.strip()
            settings[field] = value.strip()
        elif not equals and field:
            settings[field] += f",{part.strip()}"
        else:
            raise ValueError(f"{name!r}: {part!r} sets nothing, or sets a field twice; expected field=value in the brackets")
    return form["base"].strip(), settings

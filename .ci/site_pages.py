"""Pages of the site that lie elsewhere: the cards of the streams, CONTRIBUTING.md, and the notebook as text with its code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
SHEET = ".md-typeset td:first-child code { white-space: nowrap }\n"
"""A name in the first column of a table stays in one piece."""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and a style sheet; a notebook's cells become paragraphs and blocks of code."""
    files.append(File.generated(config, "site.css", content=SHEET))
    for card in sorted((ROOT / "streams" / "cards").glob("*.md")):
        files.append(File.generated(config, f"cards/{card.name}", content=card.read_text("utf-8")))
    files.append(File.generated(config, "notebook.md", content=notebook(ROOT / "docs" / "notebook.ipynb")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links that lead to these files in a checkout lead to their pages on the site."""
    return markdown.replace("](../streams/cards/", "](cards/").replace("](notebook.ipynb)", "](notebook.md)")


def notebook(path: Path) -> str:
    """The text and the code of a notebook as a page."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    return "\n\n".join(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text for cell, text in zip(cells, texts))

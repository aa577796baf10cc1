"""Shared fixtures: one thread, no network, the real files where TESTBED_DATA names them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

CHECKED = (
    "testbed.model.suffix",
    "testbed.editors.codebook.keys",
    "testbed.editors.codebook.nearest",
    "testbed.editors.locate.keys",
    "testbed.editors.locate.solver",
    "testbed.editors.locate.targets",
    "testbed.editors.locate.weight_changes",
)
"""Modules whose annotated shapes and dtypes are checked at every call while tests run.

The checker looks at random items of lists and tuples, so a module of which a test asks that it leaves `random` alone
(`testbed.editors.codebook.codebook`) has its shapes checked where it calls these."""
install_import_hook(CHECKED, "beartype.beartype")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Sums are rounded by the number of threads, so what compares bits must not inherit another test's."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the real files. Without TESTBED_DATA the test is skipped; with it, a missing folder fails."""
    root = os.environ.get("TESTBED_DATA")
    if not root:
        pytest.skip("TESTBED_DATA is not set: this test reads real data files")
    path = Path(root)
    if not path.is_dir():
        pytest.fail(f"TESTBED_DATA={root} is not a folder")
    return path


@pytest.fixture(scope="session")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up run of four editors over five years, with everything that analysis writes beside it."""
    from analysis.reporting.report import write_all
    from tests.helpers.fake_run import Plan, fake_run

    folder = fake_run(tmp_path_factory.mktemp("run"), Plan(edits=60, years=5, panel=24), notes=["the simulated world <stands> in"])
    write_all([folder], formats=("png", "pdf"), replicates=200)
    return folder

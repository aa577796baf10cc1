"""The registry: near matches, refusals, and a broken plug-in that never vanishes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from testbed.core.registry import EDITORS, PROBES, STREAMS, Registry, UnknownName


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty package `plugs_<test>` on the path."""
    package = tmp_path / "plugs"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [m for m in sys.modules if m.split(".")[0] == "plugs"]:
        monkeypatch.delitem(sys.modules, name)
    return package


def thing(name: str = "Thing", **attributes: object) -> type:
    return type(name, (), {"summary": "a thing", **attributes})


def test_the_three_registries_are_not_empty_and_say_what_they_hold() -> None:
    for registry, least in ((EDITORS, 4), (PROBES, 6), (STREAMS, 3)):
        names = registry.names()
        assert len(names) >= least
        assert names == sorted(set(names))
        for name, cls in registry.items():
            assert cls.name == name
            assert registry.get(name) is cls
            assert all(getattr(cls, need) for need in registry.needs)
            assert len(cls.summary) < 140
            assert "\n" not in cls.summary


def test_an_unknown_name_is_reported_with_near_matches_and_the_list() -> None:
    with pytest.raises(UnknownName) as caught:
        EDITORS.get("balancedti")
    message = str(caught.value)
    assert message.startswith("no editor is called 'balancedti'. Did you mean balancedit")
    assert all(name in message for name in EDITORS.names())


def test_a_name_like_nothing_gets_the_list_alone() -> None:
    with pytest.raises(UnknownName) as caught:
        PROBES.get("zzzzzz")
    assert "Did you mean" not in str(caught.value)
    assert "retention" in str(caught.value)


def test_a_name_taken_by_another_class_is_refused(folder: Path) -> None:
    registry = Registry("thing", "plugs")
    registry.register("one")(thing("First"))
    with pytest.raises(ValueError, match=r"thing 'one' is registered by .* and again by .*: rename one"):
        registry.register("one")(thing("Second"))
    assert registry.get("one").__name__ == "First"


def test_the_same_class_may_register_again(folder: Path) -> None:
    registry = Registry("thing", "plugs")
    for _ in range(2):
        registry.register("one")(thing("First"))
    assert registry.names() == ["one"]


@pytest.mark.parametrize("missing", [{}, {"traits": None}])
def test_a_class_that_lacks_what_is_needed_is_refused(missing: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"thing 'one' \(.*Thing\) lacks traits"):
        Registry("thing", "plugs", needs=("summary", "traits")).register("one")(thing(**missing))


def test_plug_ins_are_found_by_lying_in_the_folder(folder: Path) -> None:
    body = "from {0} import R\n@R.register('{1}')\nclass C:\n    summary = 'x'\n"
    (folder / "_home.py").write_text("from testbed.core.registry import Registry\nR = Registry('thing', 'plugs')\n")
    for name in ("b", "a"):
        (folder / f"{name}.py").write_text(body.format("plugs._home", name))
    (folder / "_hidden.py").write_text("raise RuntimeError('not a plug-in')")
    from plugs._home import R  # type: ignore[import-not-found]

    assert R.names() == ["a", "b"]


@pytest.mark.parametrize("broken", ["import no_such_module", "def broken(:", "raise RuntimeError('boom')", "1 / 0"])
def test_a_broken_plug_in_raises_with_its_path_every_time(folder: Path, broken: str) -> None:
    (folder / "fine.py").write_text("")
    (folder / "wrong.py").write_text(broken)
    registry = Registry("thing", "plugs")
    for look in (registry.names, lambda: registry.get("x"), lambda: list(registry.items())):
        with pytest.raises(ImportError, match=r"the thing file plugs\.wrong cannot be loaded: "):
            look()

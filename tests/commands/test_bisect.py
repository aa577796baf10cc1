"""The edit at which a signal crossed: found by halving, checked against looking after every step; edits made alone."""

from __future__ import annotations

import json
import math
from functools import cache

import pytest
import torch

from testbed.bisect import BisectConfig, find, main
from testbed.editors.base import Editor
from testbed.experiment.config import BadConfig
from testbed.experiment.rebuild import rebuild
from tests.helpers.small_run import EDITS, small_run


@cache
def norms() -> list[float]:
    """The monitor weight_relative of finetune after steps 0 to EDITS, one plain replay."""
    stored = rebuild(small_run())
    editor, out = stored.fresh("finetune"), []
    for step in range(EDITS + 1):
        if step:
            stored.advance(editor, step - 1, step)
        (name,), (w,) = editor.edited_weights().keys(), editor.edited_weights().values()
        base = stored.run.handle.parameter(name).detach().double()
        out.append(float((w.double() - base).norm() / base.norm()))
    return out


def config(**given: object) -> BisectConfig:
    plain = {"editor": "finetune", "signal": "weight_relative", "device": "cpu"}
    return BisectConfig(small_run(), **{**plain, **given})  # type: ignore[arg-type]


@pytest.mark.parametrize("step", range(1, EDITS + 1))
def test_the_step_is_found_that_looking_everywhere_finds(step: int) -> None:
    known = norms()
    assert known == sorted(known)
    found = find(config(above=(known[step - 1] + known[step]) / 2))
    assert found["step"] == step
    assert found["before"] == pytest.approx(known[step - 1])
    assert found["value"] == pytest.approx(known[step])
    assert found["edits"] == [a.event.id for a in rebuild(small_run()).run.schedule.steps[step - 1].edits]
    assert len(found["looked_at"]) <= 2 + math.ceil(math.log2(EDITS))
    for at, value in found["looked_at"].items():
        assert value == pytest.approx(known[int(at)])
    assert json.loads((small_run() / "finetune" / "bisect-weight_relative.json").read_text()) == found


def test_an_interval_is_halved_within_its_ends() -> None:
    known = norms()
    found = find(config(above=(known[3] + known[4]) / 2, after=2, upto=5))
    assert found["step"] == 4
    assert set(found["looked_at"]) <= {"2", "3", "4", "5"}


def test_edits_made_alone_start_from_the_clean_model_each() -> None:
    known = norms()
    found = find(config(above=known[1], alone=EDITS))
    values = list(found["values"].values())
    assert len(values) == EDITS
    assert values[0] == pytest.approx(known[1])
    assert all(0 < v < known[EDITS] for v in values)
    assert found["hard"] == [i for i, v in found["values"].items() if v > known[1]]
    few = find(config(above=1.0, alone=2))
    assert few["values"].items() <= found["values"].items()
    assert (len(few["values"]), few["hard"]) == (2, [])


def test_a_broken_model_has_crossed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that is not a number counts as crossed."""
    from testbed.editors.base import EditBatch

    def breaks(self: Editor, batch: EditBatch) -> dict[str, float]:
        self.weight = torch.full_like(self.weight, float("nan") if batch.step >= 5 else 0.0)  # type: ignore[attr-defined]
        return {}

    monkeypatch.setattr("testbed.editors.baselines.finetune.Finetune._edit", breaks)
    found = find(config(above=2.0, after=1))
    assert found["step"] == 5
    assert math.isnan(found["value"])


WRONG = [
    ({"signal": "kl_base"}, "--signal kl_base needs --above"),
    ({"above": 1e9}, r"after step 6, not above 1e\+09: there is no crossing in between"),
    ({"above": -1.0}, "is 0 after step 0 already, above -1: choose an earlier --after"),
    ({"above": 1.0, "after": 6}, "--after 6 and --upto 6 must be steps of the run in this order, from 0 to 6"),
    ({"above": 1.0, "upto": 7}, "must be steps of the run"),
    ({"above": 1.0, "editor": "memit"}, "has no editor 'memit'"),
    ({"above": 1.0, "signal": "colour"}, "is not perplexity, unrelated or a monitor of the run: activation_scale"),
    ({"signal": "perplexity"}, "the run asks no running text"),
    ({"signal": "unrelated", "above": 2.0}, "(not above 2: there is no crossing|has no panel of unrelated questions)"),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=range(len(WRONG)))
def test_mistakes_are_reported(given: dict[str, object], message: str) -> None:
    with pytest.raises(BadConfig, match=message):
        find(config(**given))


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    bound = str((norms()[1] + norms()[2]) / 2)
    here = [str(small_run()), "--editor", "finetune", "--signal", "weight_relative", "--device", "cpu", "--above"]
    assert main([*here, bound]) == 0
    assert "step: 2" in capsys.readouterr().out
    assert main([*here, "1e9"]) == 2
    assert "there is no crossing" in capsys.readouterr().err.replace("\n", " ")

"""An editor as an Avalanche strategy: metrics, plug-ins, loggers, and continuing from a run folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.models import build

pytest.importorskip("avalanche", reason="the bridge needs the extra: pip install 'lifelong-editing-testbed[avalanche]'")

from tests.helpers.avalanche_benchmarks import apply, quiet, settings, words  # isort: skip
from avalanche.evaluation.metrics import accuracy_metrics, bwt_metrics, forgetting_metrics, forward_transfer_metrics, loss_metrics
from avalanche.logging import CSVLogger, InteractiveLogger
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin

from testbed.core.registry import EDITORS
from testbed.editors.base import BadEditor
from testbed.editors.continual.rows import IGNORE, collate_rows
from testbed.integrations.avalanche import EditBenchmark, EditorStrategy, answer_metrics, answer_strategy
from testbed.storage.files import StoreError


def evaluator() -> Any:
    """Avalanche's own metrics, as for any strategy."""
    whole = {"experience": True, "stream": True}
    return quiet(
        accuracy_metrics(minibatch=True, epoch=True, **whole),
        loss_metrics(**whole),
        *(make(**whole) for make in (forgetting_metrics, bwt_metrics, forward_transfer_metrics)),
    )


def run(name: str, bench: EditBenchmark, **more: Any) -> tuple[EditorStrategy, list[dict[str, float]]]:
    """A strategy trained on every experience, and the metrics of an evaluation before the first and after each."""
    own = EDITORS.get(name)
    e = own(own.Config(**more.pop("settings", {})))
    strategy = EditorStrategy(editor=e, model=bench.handle, pool=bench.pool, evaluator=evaluator(), **more)
    found = [strategy.eval(bench.test_stream)]
    for x in bench.train_stream:
        strategy.train(x)
        found.append(strategy.eval(bench.test_stream))
    return strategy, found


def accuracy(found: dict[str, float], i: int) -> float:
    return found[f"Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp{i:03d}"]


def stream_value(found: dict[str, float], name: str) -> float:
    return found[f"{name}/eval_phase/test_stream"]


ROUGH = {"settings": {"steps": 3, "lr": 3e-2}}


def test_avalanches_own_metrics_follow_their_definitions() -> None:
    """Accuracy, forgetting, backward and forward transfer, computed from the table of accuracies."""
    bench = words(12)
    strategy, found = run("finetune", bench, reading="tf_exact", **ROUGH)
    table = [[accuracy(f, i) for i in range(3)] for f in found]
    assert table[1][0] > 0
    lost = [table[i + 1][i] - table[3][i] for i in range(2)]
    assert stream_value(found[-1], "StreamForgetting") == pytest.approx(sum(lost) / 2)
    assert stream_value(found[-1], "StreamBWT") == pytest.approx(-sum(lost) / 2)
    ahead = [table[i][i] - table[0][i] for i in (1, 2)]
    assert stream_value(found[-1], "StreamForwardTransfer") == pytest.approx(sum(ahead) / 2)
    assert found[-1]["Top1_Acc_MB/train_phase/train_stream/Task000"] in (0.0, 1.0)
    assert strategy.clock.train_exp_counter == 3


def test_the_same_edits_in_the_loop_and_as_a_strategy_give_the_same_state() -> None:
    bench = words(12)
    strategy, _ = run("finetune", bench, batch=2, **ROUGH)
    e = EDITORS.get("finetune")(EDITORS.get("finetune").Config(**ROUGH["settings"]))
    e.prepare(bench.handle, bench.pool)
    apply(e, [g[i : i + 2] for g in bench.groups for i in (0, 2)])
    assert torch.equal(e.weight, strategy.editor.weight)


def test_avalanches_forgetting_equals_that_of_the_summary(tmp_path: Path) -> None:
    """With experiences of one size and every edit asked, both are the first score minus the last."""
    from analysis.metrics.summary import summarise
    from analysis.reading.load import load_run

    bench = words(12)
    strategy, found = run("finetune", bench, **ROUGH)
    strategy.save(tmp_path / "out")
    ours = summarise(load_run(tmp_path / "out"), replicates=10)["editors"]["finetune"]
    last = found[-1]
    for mine, theirs in (("forgetting", "StreamForgetting"), ("backward_transfer", "StreamBWT")):
        assert ours[f"{mine}_gen"]["value"] == pytest.approx(stream_value(last, theirs))
    assert ours["edit_success_gen"]["value"] == pytest.approx(sum(accuracy(last, i) for i in range(3)) / 3)
    now = [accuracy(f, i) for i, f in enumerate(found[1:])]
    assert ours["edit_success_now_gen"]["value"] == pytest.approx(sum(now) / 3)
    assert ours["forward_transfer_gen"]["value"] == pytest.approx(stream_value(last, "StreamForwardTransfer"))
    assert ours["edits"]["value"] == 12


def test_the_oracle_is_always_right_and_forgets_nothing() -> None:
    bench = words(12)
    _, found = run("oracle", bench)
    assert [accuracy(found[-1], i) for i in range(3)] == [1, 1, 1]
    assert stream_value(found[-1], "StreamForgetting") == 0


def test_noop_is_local_and_a_trained_editor_is_not() -> None:
    bench = words(8)
    name = "Top1_Acc_Stream/eval_phase/locality_stream/Task000"
    for editor_name, more, local in (("noop", {}, True), ("finetune", {"steps": 20, "lr": 0.1}, False)):
        e = EDITORS.get(editor_name)(EDITORS.get(editor_name).Config(**more))
        strategy = EditorStrategy(editor=e, model=bench.handle, evaluator=evaluator)
        strategy.eval(bench.locality_stream)
        strategy.train(bench.train_stream)
        assert (strategy.eval(bench.locality_stream)[name] == 1) == local


def test_it_continues_from_a_run_folder(tmp_path: Path) -> None:
    bench = words(12)
    whole, _ = run("finetune", bench, **ROUGH)
    e = [EDITORS.get("finetune")(EDITORS.get("finetune").Config(**ROUGH["settings"])) for _ in range(2)]
    first, second = (EditorStrategy(editor=x, model=bench.handle, evaluator=evaluator) for x in e)
    first.train(bench.train_stream[:2])
    first.eval(bench.test_stream)
    first.save(tmp_path / "out")
    done = second.resume(tmp_path / "out")
    assert done == 2
    second.train(bench.train_stream[done:])
    second.eval(bench.test_stream)
    second.save(tmp_path / "out")
    assert torch.equal(whole.editor.weight, second.editor.weight)  # type: ignore[attr-defined]
    assert second.clock.train_exp_counter == 3
    from analysis.reading.load import load_run

    records = load_run(tmp_path / "out").editors["finetune"].records
    assert sorted(set(records["step"])) == [2, 3]


def test_a_folder_of_another_editor_is_refused(tmp_path: Path) -> None:
    bench = words(8)
    first = EditorStrategy(editor="noop", model=bench.handle, evaluator=evaluator)
    with pytest.raises(StoreError, match="nothing was trained yet"):
        first.save(tmp_path / "out")
    first.train(bench.train_stream[0])
    first.save(tmp_path / "out")
    other = EditorStrategy(editor="finetune", model=bench.handle, evaluator=evaluator)
    with pytest.raises(StoreError, match="holds the run of another editor"):
        other.resume(tmp_path / "out")
    other.train(bench.train_stream[0])
    with pytest.raises(StoreError, match="holds the run of another editor"):
        other.save(tmp_path / "out")


def test_plug_ins_and_loggers_are_called_as_by_any_strategy(tmp_path: Path) -> None:
    called: list[str] = []

    class Watch(SupervisedPlugin):
        def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            called.append("exp")

        def after_training_iteration(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            called.append("iteration")

        def after_eval_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            called.append("asked")

    bench = words(8)
    csv = CSVLogger(str(tmp_path / "csv"))
    metrics = (accuracy_metrics(experience=True, epoch=True), forgetting_metrics(experience=True))
    loud = EvaluationPlugin(*metrics, loggers=[csv, InteractiveLogger()])
    strategy = EditorStrategy(editor="noop", model=bench.handle, batch=3, plugins=[Watch()], evaluator=loud)
    strategy.train(bench.train_stream, eval_streams=[bench.test_stream])
    strategy.eval(bench.test_stream)
    csv.close()
    assert called == ["exp", "iteration", "iteration"] * 2 + ["asked"] * 2
    assert len((tmp_path / "csv" / "eval_results.csv").read_text().splitlines()) == 3


def test_a_batch_over_the_editors_limit_is_refused() -> None:
    e = EDITORS.get("noop")()
    e.traits = type(e.traits)(max_batch=2)
    with pytest.raises(BadEditor, match="noop takes at most 2 edits at once, got batch=3"):
        EditorStrategy(editor=e, model=build("llama"), batch=3, evaluator=evaluator)


def test_avalanches_metrics_of_a_strategy_over_answers() -> None:
    """A sample is right when all its tokens are; the metrics agree with the logits of the trained model."""
    bench = words(8)
    strategy = answer_strategy("naive", bench.rows, settings("naive"), evaluator=quiet(answer_metrics(forward_transfer=True)))
    strategy.eval(bench.test_stream)
    for x in bench.train_stream:
        strategy.train(x, eval_streams=[])
        found = strategy.eval(bench.test_stream)
    data = bench.test_stream[0].dataset
    x, y, _ = collate_rows([data[i] for i in range(len(data))])
    hits = (strategy.model(x).argmax(1) == y) | (y == IGNORE)
    assert accuracy(found, 0) == pytest.approx(float(hits.all(1).float().mean()))
    assert stream_value(found, "StreamForgetting") == -stream_value(found, "StreamBWT")


EXAMPLES = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs" / "avalanche.md").read_text(), re.S)


def test_the_documentation_has_an_example_of_each_direction_under_forty_lines() -> None:
    assert [("EditorStrategy" in x, "answer_strategy" in x) for x in EXAMPLES] == [(True, False), (False, True)]
    assert all(len(x.splitlines()) < 40 for x in EXAMPLES)


@pytest.mark.ci
@pytest.mark.parametrize("example", EXAMPLES, ids=["editor as strategy", "strategy over answers"])
def test_the_examples_of_the_documentation_run(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The examples run unchanged, except that they make eight edits in two years."""
    monkeypatch.chdir(tmp_path)
    config = 'config=__import__("streams.base").base.StreamConfig(edits_per_year=4, revise=0, retire=0, revert=0)'
    assert "edits=500" in example
    exec(example.replace("edits=500", f"edits=8, {config}"), {})
    assert re.search(r"forgetting -?\d", capsys.readouterr().out)

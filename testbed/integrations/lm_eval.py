"""Tasks of lm-evaluation-harness on the edited models of a run: `python -m testbed.integrations.lm_eval OUT --tasks a,b`.

The harness asks the editor's predictor, so that a codebook, an adapter with routing or a retrieval editor is measured
by its own answers. All editors and the unedited model are asked the same items. The extra [lm-eval] is needed. A task
that the predictor cannot answer exactly is refused: one whose generations continue past the end of a line, and one of
rolling text that is longer than the model's window.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is loaded
    from testbed.core import threads

    threads.prepare()

import importlib.metadata
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from testbed.core import variants
from testbed.core.events import Ask
from testbed.core.terminal import ended_by_its_reader
from testbed.experiment.config import BadConfig
from testbed.experiment.rebuild import rebuild
from testbed.model.handle import ModelHandle
from testbed.model.predictor import ModelPredictor, Predictor
from testbed.probes.base import draw
from testbed.storage.files import write_json

UNEDITED = "unedited"


@dataclass(frozen=True)
class HarnessConfig:
    """Run tasks of lm-evaluation-harness on the edited models of a run folder, and on the unedited one."""

    out: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    tasks: str = ""
    """Names of the harness's tasks, separated by commas."""
    editor: str = ""
    """Editors of the run, separated by commas; all by default."""
    include: Path | None = None
    """Folder with your own task files (YAML)."""
    items: int = 100
    """Items of each task, drawn by hash and so the same for every model and every run; 0 is all."""
    shots: int | None = None
    """Solved examples in the prompt; the task's own number by default."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""


def harness(config: HarnessConfig) -> dict[str, Any]:
    """The results by model and the items asked by task, which are also written to OUT/lm_eval.json.

    Raises `BadConfig` for a task that does not exist, and every error of `rebuild`.
    """
    lm_eval, tasks = _library(), variants.names(config.tasks)
    if tasks == [""]:
        raise BadConfig("--tasks names no task of lm-evaluation-harness")
    manager = _manager(lm_eval, tasks, config.include)
    absent = [t for t in tasks if t not in manager.all_tasks]
    if absent:
        raise BadConfig(f"lm-evaluation-harness has no task {', '.join(absent)}; see `lm-eval ls tasks`, or --include a folder of your own")
    stored = rebuild(config.out, {"device": config.device})
    samples = _samples(lm_eval.tasks.get_task_dict(tasks, manager), config.items)
    results: dict[str, Any] = {}
    for name in (UNEDITED, *stored.names(list(filter(None, variants.names(config.editor))))):
        predictor = ModelPredictor(stored.run.handle) if name == UNEDITED else stored.newest(name)[1].predictor()
        results[name] = evaluate(model(predictor, stored.run.handle), tasks, manager, samples, config.shots)
    out = {"harness": importlib.metadata.version("lm_eval"), "run": stored.run.manifest["run"], "samples": samples, "results": results}
    steps = {n: stored.folder.editor(n).newest()[0] for n in results if n != UNEDITED}
    write_json(config.out / "lm_eval.json", {**out, "steps": steps})
    return out


def _library() -> Any:
    """The harness. Raises `BadConfig` where it is not installed."""
    try:
        import lm_eval
        import lm_eval.tasks
    except ImportError as e:
        raise BadConfig(f"lm-evaluation-harness is not installed ({e}): pip install 'lifelong-editing-testbed[lm-eval]'") from e
    return lm_eval


def _manager(lm_eval: Any, tasks: Sequence[str], include: Path | None) -> Any:
    """The index of the harness's tasks and of those in a folder; of the folder alone where it holds all that are asked for.

    The harness reads thousands of files of its own for its index. A group is looked up among all, because it may name any task.
    """
    if include is None:
        return lm_eval.tasks.TaskManager()
    own = lm_eval.tasks.TaskManager(include_path=str(include), include_defaults=False)
    return own if set(tasks) <= set(own.all_subtasks) else lm_eval.tasks.TaskManager(include_path=str(include))


def _samples(tasks: dict[Any, Any], items: int) -> dict[str, list[int]] | None:
    """Indices of the items to ask, by task, drawn by hash because the harness's own limit takes the first items; None for all."""
    if not items:
        return None
    out: dict[str, list[int]] = {}
    for name, task in _leaves(tasks):
        n = len(list(task.eval_docs))
        out[name] = sorted(sorted(range(n), key=lambda i: draw(0, "lm_eval", name, str(i)))[:items])
    return out


def _leaves(tree: dict[Any, Any]) -> list[tuple[str, Any]]:
    """Name and task of every leaf of the tree of task groups."""
    below = (_leaves(value) if isinstance(value, dict) else [(str(key), value)] for key, value in tree.items())
    return [leaf for leaves in below for leaf in leaves]


def evaluate(lm: Any, tasks: Sequence[str], manager: Any, samples: dict[str, list[int]] | None, shots: int | None) -> dict[str, Any]:
    """The harness's metrics of one model by task, without its bootstrap."""
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), 0)
    asked = {"tasks": list(tasks), "task_manager": manager, "samples": samples, "num_fewshot": shots}
    output = _library().simple_evaluate(model=lm, **asked, **seeds, bootstrap_iters=0, log_samples=False)
    return {task: {k: v for k, v in row.items() if isinstance(v, (int, float))} for task, row in output["results"].items()}


def model(predictor: Predictor, handle: ModelHandle) -> Any:
    """The predictor as the harness's `LM`. Each method asks all its requests in one call, so that the predictor makes the batches."""
    from lm_eval.api.model import LM

    class PredictorLM(LM):
        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            pairs = [(context.rstrip(), continuation.strip()) for context, continuation in (r.args for r in requests)]
            texts = iter(predictor.text_logprobs([y for x, y in pairs if not x]))
            scores = predictor.score([Ask(x) for x, _ in pairs if x], [y for x, y in pairs if x])
            totals = ((float(s.logprobs.sum()), bool(s.hits.all())) for s in scores)
            return [next(totals) if x else (float(next(texts).sum()), False) for x, _ in pairs]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            texts = [r.args[0] for r in requests]
            for t in texts:
                n = len(handle.tokenizer(t)["input_ids"])
                if n > handle.window:
                    raise BadConfig(f"a rolling text has {n} tokens, {handle.name} reads {handle.window}: leave this task out")
            return [float(p.sum()) for p in predictor.text_logprobs(texts)]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            ends = [_stops(dict(r.args[1])) for r in requests]
            out: dict[int, str] = {}
            for longest in sorted({n for _, n in ends}):
                at = [i for i, (_, n) in enumerate(ends) if n == longest]
                texts = predictor.generate([Ask(requests[i].args[0].rstrip()) for i in at], longest)
                out |= {i: _cut(text, ends[i][0]) for i, text in zip(at, texts)}
            return [out[i] for i in range(len(requests))]

    return PredictorLM()


def _stops(settings: dict[str, Any]) -> tuple[list[str], int]:
    """The strings that end a generation and its most tokens. Raises `BadConfig` for one that is sampled or has several lines."""
    until = settings.get("until") or []
    until = [until] if isinstance(until, str) else list(until)
    if settings.get("do_sample") and float(settings.get("temperature", 1.0)) > 0:
        raise BadConfig("the task samples its generations; here they are greedy: leave this task out")
    if not any(u and set(u) <= {"\n"} for u in until):
        raise BadConfig(f"the task ends generations at {until!r}; here they end at a line's end, so it would be cut: leave this task out")
    return until, int(settings.get("max_gen_toks", 256))


def _cut(text: str, until: Sequence[str]) -> str:
    for end in until:
        text = text.split(end)[0] if end else text
    return text


@ended_by_its_reader()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, or 2 after a message about a mistake of the user."""
    from rich.console import Console
    from rich.table import Table

    from testbed.experiment.command import run_command

    config = tyro.cli(HarnessConfig, args=argv, prog="python -m testbed.integrations.lm_eval")
    code, output = run_command(lambda: harness(config))
    if output is None:
        return code
    table = Table("model", "task", "metric", "value", box=None)
    for name, tasks in output["results"].items():
        for task, row in tasks.items():
            for metric, value in row.items():
                table.add_row(name, task, metric, f"{value:.4g}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())

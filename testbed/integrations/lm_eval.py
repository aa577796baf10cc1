"""Tasks of lm-evaluation-harness on the edited models of a run: `python -m testbed.integrations.lm_eval OUT --tasks a,b`.

The harness asks through the editor's predictor, so a codebook, an adapter with routing or a retrieval editor is
measured as it answers, and all editors and the unedited model are asked the same items. Needs the extra [lm-eval].
What the predictor does not do is refused, not approximated: a generation that is to run on past a line's end, and
rolling text longer than the model reads at once.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from testbed.core import variants
from testbed.core.events import Ask
from testbed.experiment.config import BadConfig
from testbed.experiment.rebuild import StoredRun, rebuild
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
    """Tasks by the harness's names, separated by commas."""
    editor: str = ""
    """Editors of the run, separated by commas; all by default."""
    include: Path | None = None
    """Folder with task files (YAML) of your own."""
    items: int = 100
    """Items of each task, drawn by hash, the same for every model and every run; 0 is all."""
    shots: int | None = None
    """Solved examples; the task's own number by default."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""


def harness(config: HarnessConfig) -> dict[str, Any]:
    """Results by model, and by task the items that were asked; also written to OUT/lm_eval.json.

    Raises `BadConfig` for a task that is not there, and what `rebuild` raises.
    """
    lm_eval, tasks = _library(), variants.names(config.tasks)
    if tasks == [""]:
        raise BadConfig("--tasks names no task of lm-evaluation-harness")
    manager = lm_eval.tasks.TaskManager(include_path=str(config.include) if config.include else None)
    absent = [t for t in tasks if t not in manager.all_tasks]
    if absent:
        raise BadConfig(f"lm-evaluation-harness has no task {', '.join(absent)}; see `lm-eval ls tasks`, or --include a folder of your own")
    stored = rebuild(config.out, {"device": config.device})
    samples = _samples(lm_eval.tasks.get_task_dict(tasks, manager), config.items)
    results: dict[str, Any] = {}
    for name in (UNEDITED, *stored.names(list(filter(None, variants.names(config.editor))))):
        predictor = ModelPredictor(stored.run.handle) if name == UNEDITED else stored.newest(name)[1].predictor()
        results[name] = evaluate(model(predictor, stored.run.handle), tasks, manager, samples, config.shots)
    found = {"harness": importlib.metadata.version("lm_eval"), "run": stored.run.manifest["run"], "samples": samples, "results": results}
    write_json(config.out / "lm_eval.json", {**found, "steps": _steps(stored, [n for n in results if n != UNEDITED])})
    return found


def _steps(stored: StoredRun, editors: Sequence[str]) -> dict[str, int]:
    """After which step each editor's state was saved."""
    return {n: stored.folder.editor(n).newest()[0] for n in editors}


def _library() -> Any:
    """The harness. Raises `BadConfig` where it is not installed."""
    try:
        import lm_eval
        import lm_eval.tasks
    except ImportError as e:
        raise BadConfig(f"lm-evaluation-harness is not installed ({e}): pip install 'lifelong-editing-testbed[lm-eval]'") from e
    return lm_eval


def _samples(tasks: dict[Any, Any], items: int) -> dict[str, list[int]] | None:
    """Numbers of the items to ask, by task, drawn by hash (the harness's own limit takes the first ones); None for all."""
    if not items:
        return None
    out: dict[str, list[int]] = {}
    for name, task in _leaves(tasks):
        n = len(list(task.eval_docs))
        out[name] = sorted(sorted(range(n), key=lambda i: draw(0, "lm_eval", name, str(i)))[:items])
    return out


def _leaves(tree: dict[Any, Any]) -> list[tuple[str, Any]]:
    """Tasks of groups and of no group."""
    out = []
    for key, value in tree.items():
        out += _leaves(value) if isinstance(value, dict) else [(str(key), value)]
    return out


def evaluate(lm: Any, tasks: Sequence[str], manager: Any, samples: dict[str, list[int]] | None, shots: int | None) -> dict[str, Any]:
    """The harness's own metrics of one model by task, without its bootstrap."""
    found = _library().simple_evaluate(
        model=lm,
        tasks=list(tasks),
        task_manager=manager,
        samples=samples,
        num_fewshot=shots,
        bootstrap_iters=0,
        log_samples=False,
        random_seed=0,
        numpy_random_seed=0,
        torch_random_seed=0,
        fewshot_random_seed=0,
    )
    return {task: {k: v for k, v in row.items() if isinstance(v, (int, float))} for task, row in found["results"].items()}


def model(predictor: Predictor, handle: ModelHandle) -> Any:
    """The predictor as the harness's `LM`: three verbs, asked in whole lists so that batching stays where it is."""
    from lm_eval.api.model import LM

    class Through(LM):
        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            pairs = [r.args for r in requests]
            bare = [i for i, (context, _) in enumerate(pairs) if not context.strip()]
            rest = [i for i, (context, _) in enumerate(pairs) if context.strip()]
            out: dict[int, tuple[float, bool]] = {}
            for i, p in zip(bare, predictor.text_logprobs([pairs[i][1].strip() for i in bare])):
                out[i] = (float(p.sum()), False)
            scores = predictor.score([Ask(pairs[i][0].rstrip()) for i in rest], [pairs[i][1].strip() for i in rest])
            for i, s in zip(rest, scores):
                out[i] = (float(s.logprobs.sum()), bool(s.hits.all()))
            return [out[i] for i in range(len(pairs))]

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

    return Through()


def _stops(settings: dict[str, Any]) -> tuple[list[str], int]:
    """Strings that end a generation, and its longest length in tokens. Raises `BadConfig` for what is not greedy or runs over lines."""
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


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 for a mistake of the user's, said in plain words."""
    from rich.console import Console
    from rich.table import Table

    from testbed.experiment.command import run_command

    config = tyro.cli(HarnessConfig, args=argv, prog="python -m testbed.integrations.lm_eval")
    code, found = run_command(lambda: harness(config))
    if found is None:
        return code
    table = Table("model", "task", "metric", "value", box=None)
    for name, tasks in found["results"].items():
        for task, row in tasks.items():
            for metric, value in row.items():
                table.add_row(name, task, metric, f"{value:.4g}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())

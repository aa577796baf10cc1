"""Which edit broke the model: `python -m testbed.bisect OUT --editor NAME --after STEP --upto STEP`.

Between two checkpoints, one intact and one broken, the editor is rebuilt and the signal measured after the step in the
middle, until two neighbouring steps are left, one before the crossing and one after it. With `--alone N` each edit is
made alone on the clean model, to find the edits that break the model by themselves ("hard" edits, Yang et al. 2024).
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is loaded
    from testbed.core import threads

    threads.prepare()

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from testbed.core.schema import BaseAnswer, folder_name
from testbed.core.terminal import ended_by_its_reader
from testbed.editors.base import Editor
from testbed.experiment.answering import Answer, answer_questions, text_answers
from testbed.experiment.command import run_command
from testbed.experiment.config import BadConfig
from testbed.experiment.loop import Context, apply_step
from testbed.experiment.rebuild import StoredRun, rebuild
from testbed.probes.base import draw, smallest
from testbed.storage.files import write_json
from testbed.storage.run_folder import RunFolder

DEFAULTS = {"perplexity": math.log(2), "unrelated": 0.5}
"""Default bounds: the perplexity doubled, half of the unrelated answers changed."""
_UNRELATED = "fixed_unrelated"


@dataclass(frozen=True)
class BisectConfig:
    """Find the edit at which a signal crossed a bound, or the edits that cross it alone."""

    out: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    editor: str = ""
    """Editor of the run."""
    signal: str = "perplexity"
    """perplexity (rise of the log-perplexity of running text, nats a token), unrelated (share of answers about what no
    edit is about that have changed), or the name of a monitor (kl_base, weight_norm, ...)."""
    above: float | None = None
    """The signal has crossed where it is above this; for monitors it must be given."""
    after: int = 0
    """A step at which the signal has not crossed; 0 is the unedited model."""
    upto: int | None = None
    """A step at which it has; the last by default."""
    alone: int = 0
    """Instead: make so many edits of these steps, drawn by hash, each alone on the clean model."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""


def find(config: BisectConfig) -> dict[str, Any]:
    """The crossing, or with `alone` the signal after each edit; also written to OUT/EDITOR/bisect-SIGNAL.json (alone-SIGNAL.json).

    Raises `BadConfig` for an interval without a crossing, an unknown signal or editor, and what `rebuild` raises.
    """
    if config.signal not in DEFAULTS and config.above is None:
        raise BadConfig(f"--signal {config.signal} needs --above, the value from which on it counts as crossed")
    above = DEFAULTS[config.signal] if config.above is None else config.above
    known = RunFolder(config.out).editor(config.editor).signals()
    if config.signal not in DEFAULTS and known and config.signal not in known:
        raise BadConfig(f"--signal {config.signal!r} is not {', '.join(DEFAULTS)} or a monitor of the run: {', '.join(sorted(known))}")
    stored = rebuild(config.out, {"device": config.device})
    upto = stored.n_steps if config.upto is None else config.upto
    if not 0 <= config.after < upto <= stored.n_steps:
        raise BadConfig(f"--after {config.after} and --upto {upto} must be steps of the run in this order, from 0 to {stored.n_steps}")
    signal = partial(_SIGNALS.get(config.signal, partial(_monitor, name=config.signal)), stored.context())
    work, kind = (_alone, "alone") if config.alone else (_crossing, "bisect")
    found = {"signal": config.signal, "above": above, **work(stored, replace(config, above=above, upto=upto), signal)}
    write_json(config.out / folder_name(config.editor) / f"{kind}-{folder_name(config.signal)}.json", found)
    return found


Signal = Callable[[Editor], float]


def _crossing(stored: StoredRun, config: BisectConfig, signal: Signal) -> dict[str, Any]:
    """Halve the interval; the state at its lower end is kept, so no edit before it is made twice."""
    low, high, above = config.after, config.upto or 0, config.above or 0.0
    editor = stored.at(config.editor, low)
    seen = {low: signal(editor)}
    if _crossed(seen[low], above):
        raise BadConfig(f"{config.signal} is {seen[low]:.4g} after step {low} already, above {above:.4g}: choose an earlier --after")
    state = editor.state_dict()
    while high not in seen or high - low > 1:
        middle = (low + high) // 2 if high in seen else high
        editor.load_state_dict(state)
        stored.advance(editor, low, middle)
        seen[middle] = signal(editor)
        if _crossed(seen[middle], above):
            high = middle
        elif middle == high:
            raise BadConfig(
                f"{config.signal} is {seen[high]:.4g} after step {high}, not above {above:.4g}: there is no crossing in between"
            )
        else:
            low, state = middle, editor.state_dict()
    edits = [a.event.id for a in stored.run.schedule.steps[high - 1].edits]
    looked_at = {str(k): v for k, v in sorted(seen.items())}
    return {"step": high, "edits": edits, "before": seen[low], "value": seen[high], "looked_at": looked_at}


def _alone(stored: StoredRun, config: BisectConfig, signal: Signal) -> dict[str, Any]:
    steps = stored.run.schedule.steps[config.after : config.upto]
    pool = [(s, a) for s in steps for a in s.edits if a.event.kind != "retire"]
    chosen = smallest(pool, config.alone, lambda x: draw(stored.run.config.seed, "alone", x[1].event.id))
    editor, context = stored.fresh(config.editor), stored.context()
    clean = editor.state_dict()
    values: dict[str, float] = {}
    for step, applied in chosen:
        editor.load_state_dict(clean)
        apply_step(context, editor, replace(step, edits=(applied,), questions=()))
        values[applied.event.id] = signal(editor)
    return {"values": values, "hard": [i for i, v in values.items() if _crossed(v, config.above or 0.0)]}


def _crossed(value: float, above: float) -> bool:
    """True above the bound, and for NaN."""
    return math.isnan(value) or value > above


def _perplexity(context: Context, editor: Editor) -> float:
    """Rise of the negative log-likelihood (nats per token) over the unedited model, pooled over the texts of the run."""
    texts = [q for q in context.schedule.unique_questions.values() if q.split == "text"]
    if not texts:
        raise BadConfig("the run asks no running text, so there is no perplexity; choose another --signal")

    def loss(answers: Sequence[Answer | BaseAnswer]) -> float:
        return -sum(a.logprob or 0.0 for a in answers) / sum(a.n_tokens or 0 for a in answers)

    return loss(text_answers(editor.predictor(), texts)) - loss([context.base[q.id] for q in texts])


def _unrelated(context: Context, editor: Editor) -> float:
    """Share of the fixed panel of unrelated questions whose answers differ from those of the unedited model."""
    panel = {a.plan.question.id: a.plan.question for s in context.schedule.steps for a in s.questions if a.plan.panel == _UNRELATED}
    if not panel:
        raise BadConfig("the run has no panel of unrelated questions; choose another --signal")
    answers = answer_questions(context, editor.predictor(), list(panel.values()), [None] * len(panel))
    return 1 - sum(bool(a.exact) for a in answers) / len(panel)


def _monitor(context: Context, editor: Editor, name: str) -> float:
    if not context.watch.asks:
        raise BadConfig("the run has no questions that monitors could look at")
    rows = {r.name: r.value for r in context.watch.rows(0, editor.predictor(), editor.edited_weights())}
    if name not in rows:
        raise BadConfig(f"--signal {name!r} is not perplexity, unrelated or a monitor that has a value here: {', '.join(sorted(rows))}")
    return rows[name]


_SIGNALS = {"perplexity": _perplexity, "unrelated": _unrelated}


@ended_by_its_reader()
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 for a mistake of the user, printed as a plain line."""
    config = tyro.cli(BisectConfig, args=argv, prog="python -m testbed.bisect")
    code, found = run_command(lambda: find(config))
    out = Console()
    for key, value in (found or {}).items():
        out.print(f"{key}: {value}", markup=False, highlight=False, soft_wrap=True)
    return code


if __name__ == "__main__":
    sys.exit(main())

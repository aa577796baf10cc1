"""What manifest.json says about a run: everything that was fixed before the first edit, and a line for all that a reader must know."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from testbed.benchmarks import files as benchmarks
from testbed.core import grading
from testbed.core.events import content_id
from testbed.core.plugins import installed_plugins
from testbed.core.registry import PROBES
from testbed.core.schema import SCHEMA_VERSION
from testbed.experiment import preflight
from testbed.experiment.config import RunConfig, plain
from testbed.experiment.protocols import PROTOCOLS, departures
from testbed.experiment.schedule import GRID, Schedule
from testbed.model.prompt_forms import OWN_FORM
from testbed.probes.base import Planned
from testbed.storage.shared_cache import package_version

if TYPE_CHECKING:
    from testbed.experiment.runner import PreparedRun


def manifest_of(run: PreparedRun) -> dict[str, Any]:
    """The content of manifest.json."""
    config, handle, editors = run.config, run.handle, run.resolved.editors
    hashes = {"model_hash": handle.hash, "stream_hash": run.stream.stream_hash(run.events), "schedule_hash": run.schedule.hash}
    parameters = sum(p.numel() for p in handle.model.parameters())
    return {
        "run": content_id(config.identity(), hashes),
        "schema_version": SCHEMA_VERSION,
        "grading_version": grading.VERSION,
        "config": config.stored(),
        "editors": list(editors),
        "references": [name for name, e in editors.items() if e.create().traits.told_truth],
        "editor_configs": {name: plain(e.config) for name, e in editors.items()},
        "stream": run.stream.manifest(),
        "model": {"name": handle.name, "hash": handle.hash, "family": handle.family.name, "parameters": parameters},
        "prompt": run.prompt.stored(),
        "belief": run.belief.stored() if run.belief else None,
        **hashes,
        "seed": config.seed,
        "edits": len(run.events),
        "years": len({e.year for e in run.events}),
        "steps": len(run.schedule.steps),
        "questions": run.schedule.n_questions,
        "panel_scale": run.schedule.scale,
        "max_new_tokens": run.max_new_tokens,
        "device": str(handle.device),
        "threads": torch.get_num_threads(),
        "dtype": str(handle.dtype).removeprefix("torch."),
        **({"protocols": {name: PROTOCOLS[name].stored() for name in config.protocol}} if config.protocol else {}),
        **({"plugins": sorted(run.resolved.plugins.values())} if run.resolved.plugins else {}),
        **({"entry_points": installed} if (installed := installed_plugins()) else {}),
        "versions": _versions(),
        "command": command_of(config),
        **source(),
        "notes": notes_of(run),
        "benchmarks": {b.topic: benchmarks.describe(b) for b in run.resolved.benchmarks.every},
    }


def notes_of(run: PreparedRun) -> list[str]:
    """What the user is told about a run before its first edit, a line each."""
    loaded = {f"plugin {name}": digest for name, digest in run.resolved.plugins.items()} | installed_plugins()
    plugins = [f"{name}: SHA-256 {digest[:12]}..." for name, digest in loaded.items()]
    names = [e.note for e in run.resolved.editors.values() if e.note]
    names += departures(run.config.protocol, vars(run.config) | {"prompt": run.prompt.form.name})
    names += preflight.long_targets(run.events, run.handle, {n: e.cls for n, e in run.resolved.editors.items()})
    return [*plugins, *names, *_stream_notes(run), *_question_notes(run), *_model_notes(run)]


def _stream_notes(run: PreparedRun) -> list[str]:
    """What stands in, was skipped or reordered."""
    config, stream, n = run.config, run.stream, len(run.events)
    out = [f"{config.stream}: {stream.origin}; its time axis is {stream.time_axis}"]
    if config.data_root is None and stream.time_axis == "simulated" != run.resolved.stream.cls.time_axis:
        out.append("no --data-root was given: the simulated world stands in for files")
    if (order := stream.config.order) != "drawn":
        out.append(f"the same edits as without stream.order, in another order: {order}")
    if stream.skipped:
        reasons = stream.manifest()["skipped_by_reason"]
        out.append(f"{len(stream.skipped)} records were skipped: " + "; ".join(f"{n} x {r}" for r, n in sorted(reasons.items())))
    out += stream.notes(run.events)
    return out + ([f"the stream holds {n} edits, {config.edits} were asked for"] if n < config.edits else [])


def _paraphrases_asked(planned: Schedule) -> list[str]:
    """How many paraphrases of an edit stand behind text generality, which papers average over one to ten."""
    asked: dict[str, set[str]] = defaultdict(set)
    for plan in (q.plan for step in planned.steps for q in step.questions):
        if plan.question.split == "text_generality" and plan.edit is not None and plan.panel == "age_mixed":
            asked[plan.edit.event.id].add(plan.question.id)
    if not asked:
        return []
    mean = sum(map(len, asked.values())) / len(asked)
    return [f"text generality asks {mean:.2g} paraphrase{'' if mean == 1 else 's'} an edit; --set probes.paraphrases=N asks more"]


def _notes_of_probes(planned: Schedule) -> list[str]:
    """What each probe says about the questions that it asks."""
    asked: dict[str, list[Planned]] = defaultdict(list)
    for q in (q for step in planned.steps for q in step.questions):
        asked[q.probe].append(q.plan)
    return [line for name, cls in PROBES.items() for line in cls().notes(asked[name]) if name in asked]


def _question_notes(run: PreparedRun) -> list[str]:
    """How the questions were cut to their budget and to the model, and what can never be right."""
    config, schedule, out = run.config, run.schedule, [*_paraphrases_asked(run.schedule), *_notes_of_probes(run.schedule)]
    if schedule.scale < 1:
        last = min(1.0, schedule.scale * config.resolve_probes().end)
        end = f" ({100 * last:.2g} % at the end)" if last != schedule.scale else ""
        out.append(f"panels were shrunk to {100 * schedule.scale:.2g} %{end} to keep to {config.probe_budget} questions per 500 edits")
    if schedule.n_questions > (allowed := config.probe_budget * max(1.0, len(run.events) / GRID)):
        smallest = "the questions right after each edit and the smallest panels take more"
        out.append(f"{schedule.n_questions} questions are asked of each editor, not {allowed:.0f} (--probe-budget): {smallest}")
    if run.max_new_tokens < config.max_new_tokens:
        window = f"the window of {run.handle.window} tokens leaves no more behind the longest prompt"
        out.append(f"generations end after {run.max_new_tokens} tokens, not {config.max_new_tokens} (--max-new-tokens): {window}")
    pictures = {q.image.key: q.image for q in schedule.unique_questions.values() if q.image is not None}
    if transparent := sum(getattr(p, "transparent", False) for p in pictures.values()):
        out.append(f"{transparent} pictures have transparent pixels, which are laid on white")
    return out + preflight.never_right(schedule, run.handle, run.max_new_tokens)


def _model_notes(run: PreparedRun) -> list[str]:
    """How the model was loaded and is asked, and what it believes."""
    form = [run.prompt.line] if run.prompt.form.name != OWN_FORM else []
    left_out = [f"benchmarks, left out: {line}" for line in run.resolved.benchmarks.skipped]
    return [*run.handle.notes, *form, *(run.belief.lines() if run.belief else []), *run.resolved.benchmarks.notes, *left_out]


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "numpy", "pyarrow", "pandas", "lifelong-editing-testbed")
    return {"python": platform.python_version(), **{p: package_version(p) or "not installed as a package" for p in packages}}


def command_of(config: RunConfig) -> list[str]:
    """The words of a command that makes the run again: every field that is not its default, but for the folder it is written to."""
    words = ["python", "-m", "testbed.run"]
    usual = RunConfig().stored()
    for name, value in config.stored().items():
        if name != "stream" and value == usual.get(name):
            continue
        values = value if isinstance(value, list) else [value]
        for text in map(str, values) if name == "set" else [",".join(map(str, values))]:
            words += [f"--{name.replace('_', '-')}", text]
    return words


def source() -> dict[str, str | None]:
    """What the code of the run was: the commit where a repository tracks the package, else the hash of its files."""
    commit = git_commit(Path(__file__).parents[1])
    return {"git": commit} if commit else {"git": None, "files_sha256": files_hash(Path(__file__).parents[2])}


def git_commit(package: Path) -> str | None:
    """The commit of the repository that tracks the package's files, with + where tracked files differ from it; None without one."""
    tracked, commit = ["git", "ls-files", "--error-unmatch", "__init__.py"], ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        done = [subprocess.run(c, cwd=package, capture_output=True, text=True, check=True, timeout=10) for c in (tracked, commit)]
    except (OSError, subprocess.SubprocessError):
        return None
    return done[1].stdout.strip()


def files_hash(root: Path) -> str:
    """SHA-256 over names and contents of the Python and data files of the three packages under a folder."""
    digest = hashlib.sha256()
    files = (p for name in ("analysis", "streams", "testbed") for p in (root / name).rglob("*") if p.is_file() and p.suffix != ".pyc")
    for path in sorted(files):
        digest.update(f"{path.relative_to(root).as_posix()} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()

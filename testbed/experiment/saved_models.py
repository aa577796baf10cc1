"""`--save-model`: the edited model as plain transformers loads it, with the template of its prompts and a card that shows how to ask it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from PIL import Image

from testbed.core.events import EditEvent
from testbed.core.schema import folder_name
from testbed.model.encoding import prompt_in_template
from testbed.model.handle import ModelHandle
from testbed.model.predictor import ModelPredictor
from testbed.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from testbed.experiment.runner import PreparedRun

_CARD = """---
library_name: transformers
tags: [model-editing]
---
# {name}, edited by {editor}

The weights of {name} after {edits:,} edits of the stream `{stream}` (seed {seed}), made by the lifelong-editing testbed {version}.
The licence is that of {name}.

One of its edits: the answer to

```
{prompt}
```

was to become `{target}`. Asked as the run asked{about}, this model answers `{answer}`:

```python
{code}
```
{form}"""

_PICTURE_FILE = "edited-question.png"
_TEXT = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".", dtype="{dtype}")
inputs = tokenizer({prompt!r}, return_tensors="pt")
out = model.generate(**inputs, max_new_tokens={tokens}, do_sample=False)
print(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip().split("\\n")[0])"""

_PICTURE = """from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

processor, model = AutoProcessor.from_pretrained("."), AutoModelForImageTextToText.from_pretrained(".", dtype="{dtype}")
inputs = processor(images=[Image.open("edited-question.png").convert("RGB")], text=[{prompt!r}], return_tensors="pt")
out = model.generate(**inputs, max_new_tokens={tokens}, do_sample=False)
print(processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip().split("\\n")[0])"""


def save_models(run: PreparedRun, folder: RunFolder, say: Callable[[str], None]) -> None:
    """Write the edited model of every editor that changes weights under `config.save_model`, with save_pretrained."""
    if run.config.save_model is None:
        return
    for name, resolved in run.resolved.editors.items():
        if not resolved.cls.traits.weights:
            say(f"{name} changes no weights of the model, so there is no edited model to save")
            continue
        editor = run.editor(name)
        step, state = folder.editor(name).newest()
        editor.load_state_dict(state)
        event = newest_live_edit(run, step)
        target = run.config.save_model / folder_name(name)
        with run.handle.swapped(editor.edited_weights()):
            run.handle.model.save_pretrained(target)
            card = model_card(run, name, step, event)
        tokenizer = run.handle.tokenizer
        kept, tokenizer.chat_template = tokenizer.chat_template, tokenizer.chat_template or chat_template(run.handle)
        try:
            (run.handle.processor or tokenizer).save_pretrained(target)
        finally:
            tokenizer.chat_template = kept
        if event.image is not None:
            Image.fromarray(event.image.load()).save(target / _PICTURE_FILE)
        (target / "README.md").write_text(card, encoding="utf-8")
        say(f"{name}: edited model written to {target}")


def chat_template(handle: ModelHandle) -> str | None:
    """The form of the run's prompts as a Jinja template over messages; None where it depends on the relation or shows a picture."""
    text = handle.family.text
    if "{examples}" in text or handle.reads_pictures:
        return None
    before, _, after = (part.replace("{{", "{").replace("}}", "}") for part in text.partition("{prompt}"))
    return f"{{{{ {before!r} }}}}{{{{ messages[-1]['content'] }}}}{{{{ {after!r} }}}}"


def newest_live_edit(run: PreparedRun, step: int) -> EditEvent:
    """The newest edit up to a step that was not superseded; where there is none, the newest of all."""
    edits = [a.event for s in run.schedule.steps[:step] for a in s.edits]
    return ([e for e in edits if e.kind != "retire" and e.id not in run.schedule.superseded] or edits)[-1]


def model_card(run: PreparedRun, editor: str, step: int, event: EditEvent) -> str:
    """README.md of the edited model, whose weights are in place: an edited question, how to ask it, and what is answered."""
    handle, ask = run.handle, event.ask()
    prompt = prompt_in_template(handle, ask)[0]
    answer = ModelPredictor(handle).generate([ask], run.max_new_tokens)[0]
    code = _TEXT if ask.image is None else _PICTURE
    dtype = str(handle.model.dtype).removeprefix("torch.")
    own = "" if chat_template(handle) is None else "\nThe tokenizer's chat template holds this form.\n"
    shown = "\nTwo solved examples of the relation stand before every prompt.\n" if "{examples}" in handle.family.text else own
    return _CARD.format(
        name=handle.name,
        editor=editor,
        edits=sum(len(s.edits) for s in run.schedule.steps[:step]),
        stream=run.config.stream,
        seed=run.config.seed,
        version=run.manifest["versions"]["lifelong-editing-testbed"],
        prompt=event.prompt,
        target=event.target,
        answer=answer.strip(),
        about="" if ask.image is None else f" about the picture `{_PICTURE_FILE}`",
        code=code.format(dtype=dtype, prompt=prompt, tokens=run.max_new_tokens),
        form=shown,
    )

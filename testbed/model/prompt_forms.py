"""The form in which a text model is asked, one for edits and questions alike, chosen by what the model then answers.

A base model completes text, a chat model answers a user, and a model that is asked in the wrong form knows little: the form
in which it gives the most old answers is taken. It stands in the place of the family's templates, so that every editor's own
prompts (contexts, facts before a question) have it too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from testbed.core import grading
from testbed.core.events import Ask
from testbed.model.handle import BadModel, ModelHandle
from testbed.model.predictor import ModelPredictor

QUESTIONS, NEW_TOKENS = 40, 12
"""Development questions by which a form is chosen, and tokens generated for each."""
OWN_FORM = "the family's own"
"""Name of the form of a model whose family has a template, or of a stream that knows no old answers."""
_USER = "{prompt}"


@dataclass(frozen=True)
class PromptForm:
    """A template of prompts and how an answer follows it, as in `testbed.model.families.Family`."""

    name: str
    text: str = "{prompt}"
    answer: str = " {answer}"


@dataclass(frozen=True)
class ChosenForm:
    """A form, and by the name of each form that was tried the share of development questions answered with the old answer."""

    form: PromptForm
    shares: dict[str, float] = field(default_factory=dict)

    def stored(self) -> dict[str, Any]:
        """The manifest's entry."""
        return {"form": self.form.name, "text": self.form.text, "answer": self.form.answer, "shares": self.shares}

    @property
    def line(self) -> str:
        """What the user is told."""
        tried = ", ".join(f"{name} {share:.0%}" for name, share in self.shares.items())
        chosen = f"chosen by the share of old answers among development questions: {tried}" if tried else "not chosen by data"
        return f"prompt form: {self.form.name} ({chosen})"


def forms(handle: ModelHandle) -> dict[str, PromptForm]:
    """The forms that this model can be asked in, the simplest first."""
    found = [PromptForm("bare"), PromptForm("question", "Question: {prompt}\nAnswer:")]
    if handle.examples:
        found.append(PromptForm("examples", "{examples}{prompt}"))
    if getattr(handle.tokenizer, "chat_template", None):
        found.append(_chat(handle))
    return {form.name: form for form in found}


def _chat(handle: ModelHandle) -> PromptForm:
    """The tokenizer's chat template with the prompt as the user's words."""
    message = [{"role": "user", "content": "PROMPT"}]
    text = handle.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    begin = handle.tokenizer.bos_token or ""
    if begin and handle.tokenizer("a")["input_ids"][:1] == [handle.tokenizer.bos_token_id]:
        text = text.removeprefix(begin)  # the tokenizer adds its own
    if text.count("PROMPT") != 1:
        raise BadModel(f"{handle.name}: the chat template does not hold the user's words once: choose another form with --prompt")
    return PromptForm("chat", text.replace("{", "{{").replace("}", "}}").replace("PROMPT", _USER), "{answer}")


def choose(handle: ModelHandle, known: Sequence[tuple[Ask, str]]) -> ChosenForm:
    """The form in which the model begins with the most answers of `known`, of which 40 are asked; the simplest of equal ones.

    The handle keeps its own templates. Prompts that fit into the model's window in every form are asked; without any the simplest
    form is taken.
    """
    own, shares = handle.family, dict[str, float]()
    found = forms(handle)
    asked = [(ask, answer) for ask, answer in known if _fits(handle, ask, found.values())][:QUESTIONS]
    if not asked:
        return ChosenForm(next(iter(found.values())))
    try:
        for name, form in found.items():
            use(handle, form)
            said = ModelPredictor(handle).generate([ask for ask, _ in asked], NEW_TOKENS)
            shares[name] = sum(grading.begins(s, [a]) for s, (_, a) in zip(said, asked)) / len(asked)
    finally:
        handle.family = own
        handle.cache.pop("answers", None)
    return ChosenForm(found[max(shares, key=lambda name: shares[name])], shares)


def _fits(handle: ModelHandle, ask: Ask, tried: Iterable[PromptForm]) -> bool:
    """Whether the window holds this prompt in each form and a generation behind it."""
    texts = (f.text.format(prompt=ask.prompt, examples=handle.examples.get(ask.relation, "")) for f in tried)
    return all(len(handle.tokenizer(text)["input_ids"]) + NEW_TOKENS <= handle.window for text in texts)


def show_examples(handle: ModelHandle, examples: Mapping[str, Sequence[tuple[str, str]]]) -> None:
    """Put two examples of its relation in front of a prompt in the form `examples`: prompt and answer, a line each."""
    handle.examples = {r: "".join(f"{prompt} {answer}\n" for prompt, answer in shown) for r, shown in examples.items()}


def use(handle: ModelHandle, form: PromptForm) -> None:
    """Ask the model in this form from now on."""
    handle.family = replace(handle.family, text=form.text, answer=form.answer)
    handle.cache.pop("answers", None)

"""The form in which a text model is asked, one for edits and questions alike, chosen by what the model then answers.

A base model completes text, a chat model answers a user, and a model that is asked in the wrong form knows little: the form
in which it gives the most old answers is taken. It stands in the place of the family's templates, so that every editor's own
prompts (contexts, facts before a question) have it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from testbed.core import grading
from testbed.core.events import Ask
from testbed.model.handle import BadModel, ModelHandle
from testbed.model.predictor import ModelPredictor

QUESTIONS, NEW_TOKENS = 40, 12
"""Development questions by which a form is chosen, and tokens generated for each."""
_USER = "{prompt}"


@dataclass(frozen=True)
class PromptForm:
    """A template of prompts and how an answer follows it, as in `testbed.model.families.Family`."""

    name: str
    text: str
    answer: str = " {answer}"


@dataclass(frozen=True)
class ChosenForm:
    """A form, and by the name of each form that was tried the share of development questions answered with the old answer."""

    form: PromptForm
    shares: dict[str, float]

    def __str__(self) -> str:
        tried = ", ".join(f"{name} {share:.0%}" for name, share in self.shares.items())
        return f"prompt form: {self.form.name}" + (f" (old answers among {QUESTIONS} development questions: {tried})" if tried else "")


def forms(handle: ModelHandle, examples: Sequence[tuple[str, str]]) -> dict[str, PromptForm]:
    """The forms that this model can be asked in, the simplest first.

    examples: two prompts with their answers, which stand in front of every prompt of the form `examples`.
    """
    shown = "".join(f"{prompt} {answer}\n" for prompt, answer in examples).replace("{", "{{").replace("}", "}}")
    found = [PromptForm("bare", "{prompt}"), PromptForm("question", "Question: {prompt}\nAnswer:")]
    if examples:
        found.append(PromptForm("examples", shown + "{prompt}"))
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


def choose(handle: ModelHandle, known: Sequence[tuple[str, str]], examples: Sequence[tuple[str, str]]) -> ChosenForm:
    """The form in which the model gives the most answers of `known` ((prompt, old answer), of which 40 are asked).

    The simplest of equal forms is taken. The handle keeps its own templates.
    """
    own, asked, shares = handle.family, known[:QUESTIONS], dict[str, float]()
    found = forms(handle, examples)
    try:
        for name, form in found.items():
            use(handle, form)
            said = ModelPredictor(handle).generate([Ask(prompt) for prompt, _ in asked], NEW_TOKENS)
            shares[name] = sum(grading.begins(s, [a]) for s, (_, a) in zip(said, asked)) / len(asked)
    finally:
        handle.family = own
    return ChosenForm(found[max(shares, key=lambda name: shares[name])], shares)


def use(handle: ModelHandle, form: PromptForm) -> None:
    """Ask the model in this form from now on."""
    handle.family = replace(handle.family, text=form.text, answer=form.answer)
    handle.cache.pop("answers", None)

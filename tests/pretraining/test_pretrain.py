"""The tiny model: packing equals separate prompts, trainings run end to end, the committed weights meet their thresholds."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from streams.base import Stream, StreamConfig
from streams.world.facts import World, world
from testbed import pretrain as command
from testbed.core.events import EditEvent, Question
from testbed.core.registry import STREAMS
from testbed.editors.retrieval import prompts
from testbed.model.loading import load as load_handle
from testbed.pretraining.curriculum import Curriculum, corpus, question_in_context
from testbed.pretraining.evaluation import AbilityScore, ability_questions, generate, share_right, sibling_damage
from testbed.pretraining.packing import Example, Packer, packed_logits
from testbed.pretraining.stages import evaluate_world, rng_of
from testbed.pretraining.tiny_model import build_model, build_processor, build_tokenizer, load, save
from testbed.pretraining.tokenizer_extension import extend_model, extend_tokenizer
from testbed.pretraining.training import TrainingSchedule, rate_factor, train, train_tower, training_progress, world_batches
from tests.helpers.photos import beliefs

SMALL = 40
WITH_IMAGE = "USER: <image>\n{prompt} ASSISTANT:"
TEXT_ONLY = "USER: {prompt} ASSISTANT:"


@pytest.fixture(scope="module")
def small() -> World:
    return World(0, SMALL)


@pytest.fixture(scope="module")
def parts(small):
    tokenizer = build_tokenizer(corpus(small, rng_of(0, 5)))
    return tokenizer, build_processor(tokenizer), build_model(tokenizer, 0).eval()


@pytest.fixture(scope="module")
def saved(parts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save(parts[2], parts[1], folder)
    return folder


def test_a_packed_row_computes_what_separate_prompts_do(small, parts):
    tokenizer, processor, model = parts
    curriculum = Curriculum(small, np.random.default_rng(3))
    curriculum.progress = 1.0
    examples, photo = curriculum.photo()
    packer = Packer(tokenizer)
    texts = [Example("What is 2 plus 3?", "5"), Example("There is a club called Fasuna.", None)]
    batch = packer.batch([packer.row(texts), packer.row(examples, photo)])
    with torch.no_grad():
        packed = packed_logits(model, batch, packer.photo_at)
        alone = [_alone(model, processor, e, p) for e, p in [*((e, photo) for e in examples), *((e, None) for e in texts)]]
    wanted = torch.cat(alone[: _fitting(packer, examples, photo)] + alone[len(examples) :])
    assert packed.shape == wanted.shape
    torch.testing.assert_close(packed, wanted, rtol=1e-3, atol=1e-3)


def _fitting(packer: Packer, examples: list[Example], photo: np.ndarray) -> int:
    """Number of leading examples in the row; the row is cut to those for the comparison."""
    row = packer.row(examples, photo)
    blocks = row.block[-1]
    assert packer.row(examples[:blocks], photo).ids == row.ids
    return blocks


def _alone(model, processor, example: Example, photo: np.ndarray | None) -> torch.Tensor:
    """Logits that predict the answer (or the text) and the end, from an ordinary unpacked prompt."""
    template = WITH_IMAGE if photo is not None else TEXT_ONLY
    prompt = "" if example.answer is None else template.format(prompt=example.prompt)
    whole = example.prompt if example.answer is None else f"{prompt} {example.answer}"
    pictures = {} if photo is None else {"images": [photo]}
    read = processor if photo is not None else processor.tokenizer
    inputs, shown = (read(text=[t], return_tensors="pt", **pictures) for t in (whole, prompt))
    start = shown["input_ids"].shape[1] - 1
    inputs = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask", "pixel_values")}
    return model(**inputs).logits[0, start:]


@pytest.mark.parametrize("text", ["Zürich — 東京 🙂", "an unheard-of word", "a\n\tb", "USERs ASSIST"])
def test_the_tokenizer_spells_any_text(parts, text):
    ids = parts[0](text, add_special_tokens=False)["input_ids"]
    assert parts[0].decode(ids) == text


def test_names_are_short_and_an_answer_is_the_same_alone_and_after_its_prompt(small, parts):
    tokenizer = parts[0]

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    assert all(len(ids(f" {e.name}")) <= 2 for e in small.entities)
    prompt = TEXT_ONLY.format(prompt="Who leads Fasuna?")
    assert ids(f"{prompt} Masa Bidiras") == ids(prompt) + ids(" Masa Bidiras")
    assert tokenizer(prompt)["input_ids"][0] == tokenizer.bos_token_id and tokenizer.padding_side == "left"
    assert len(ids("USER:")) == len(ids(" ASSISTANT:")) == 1


def test_a_saved_model_comes_back_in_fp32_with_its_own_answers(saved, parts):
    model, processor = load(saved)
    assert model.dtype == torch.float32
    for name, value in parts[2].state_dict().items():
        assert torch.equal(model.state_dict()[name], value.bfloat16().float()), name
    photo = np.full((60, 90, 3), 128, np.uint8)
    inputs = processor(text=[WITH_IMAGE.format(prompt="Which club has this emblem?")], images=[photo], return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_index).sum() == 36
    assert inputs["pixel_values"].shape == (1, 3, 48, 48)


def test_batching_does_not_change_answers(saved):
    handle = load_handle(str(saved), "cpu", "float32")
    photo = np.zeros((48, 48, 3), np.uint8)
    asked = [
        Example("What is 2 plus 3?", "5"),
        Example("Who?", "x", photo),
        Example("Which is larger, 3 or 12?", "12"),
        Example("Tell me the name of it.", "y", photo),
    ]
    together = generate(handle, asked, new_tokens=4)
    assert together == [generate(handle, [a], new_tokens=4)[0] for a in asked]


@pytest.mark.parametrize("by_picture", [False, True])
def test_context_questions_use_the_shared_wording_and_have_one_answer(small, by_picture):
    rng = np.random.default_rng(0)
    for entity in small.entities:
        e = question_in_context(small, entity, rng, by_picture, "which")
        stated = re.findall(r"\d\) (.+?[?]) (.+?)\. ", e.prompt)
        assert len({s for s, _ in stated}) == len({v for _, v in stated}) == len(stated) == 4
        assert e.answer in {v for _, v in stated}
        e = question_in_context(small, entity, rng, by_picture, "answer")
        assert e.prompt.startswith("Facts: 1) ") and f"{e.answer}." in e.prompt and " Question: " in e.prompt
        assert question_in_context(small, entity, rng, by_picture, "none").answer == prompts.NONE
        assert question_in_context(small, entity, rng, by_picture, "memory").answer in {small.value(entity, s) for s in range(4)}


@pytest.mark.parametrize("by_picture", [False, True])
@pytest.mark.parametrize("progress", [0.0, 1.0])
def test_examples_in_context_share_a_beginning_and_follow_the_stated_facts(small, by_picture, progress):
    curriculum = Curriculum(small, np.random.default_rng(4))
    curriculum.progress = progress
    for _ in range(30):
        examples, photo, shared = curriculum.context(by_picture)
        assert (photo is not None) is by_picture and shared.startswith("Facts: 1) ") and examples
        for e in examples:
            assert e.prompt.startswith((" Question: ", " Which fact answers: "))
            if e.prompt.startswith(" Which") and e.answer != prompts.NONE:
                assert f"? {e.answer}." in shared


def test_a_shared_beginning_changes_no_token_of_a_prompt(small, parts):
    curriculum, packer = Curriculum(small, np.random.default_rng(5)), Packer(parts[0])
    for by_picture in (False, True):
        examples, photo, shared = curriculum.context(by_picture)
        row = packer.row(examples[:1], photo, shared)
        whole = packer.row([Example(shared + examples[0].prompt, examples[0].answer)], photo)
        assert row.ids == whole.ids and row.position == whole.position and row.label == whole.label


@pytest.mark.ci
def test_training_lowers_the_loss_and_repeats_itself(small, parts):
    schedule = TrainingSchedule(steps=6, rows=(1, 1, 1, 1))

    def losses() -> list[float]:
        out: list[float] = []
        model = build_model(parts[0], 1)
        batches = world_batches(Curriculum(small, np.random.default_rng(2)), Packer(parts[0]), schedule)
        assert train(model, Packer(parts[0]), batches, schedule, lambda _, loss: out.append(loss)) == 6
        return out

    first = losses()
    assert first[-1] < first[0] and losses() == first


def test_the_tower_trains_and_leaves_the_global_generator_alone(parts):
    before = torch.random.get_rng_state()
    seen: list[float] = []
    model = build_model(parts[0], 2)
    train_tower(model, np.random.default_rng(1), 4, lambda done, _: seen.append(done))
    assert seen == [0.25, 0.5, 0.75, 1.0]
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_rate_rises_then_falls_to_zero():
    factors = [rate_factor(p, 0.1) for p in (0.05, 0.1, 0.55, 1.0)]
    assert factors == pytest.approx([0.5, 1.0, 0.5, 0.0])
    assert training_progress(TrainingSchedule(10, minutes=1e9), 5, 1.0) == 0.5
    assert training_progress(TrainingSchedule(10), 5, 60.0) == 0.5
    assert training_progress(TrainingSchedule(10**9, minutes=4.0), 0, 1.0) == 0.25
    assert training_progress(TrainingSchedule(10**9, minutes=1e-9), 0, 1.0) == 1.0


def test_measuring_the_damage_puts_the_weights_back(small, saved):
    handle = load_handle(str(saved), "cpu", "float32")
    before = {k: v.clone() for k, v in handle.model.state_dict().items()}
    rows = sibling_damage(handle, small, n=4, edits=2)
    assert [r.unit for r in rows] == ["share right", "share lost"]
    assert all(torch.equal(v, before[k]) for k, v in handle.model.state_dict().items())


def test_new_words_become_one_token_and_old_ones_stay(small, parts):
    tokenizer, _, model = parts
    texts = [" a passenger bus"] * 3 + ["\nIn this photograph, what is it?"]
    longer, parents = extend_tokenizer(tokenizer, texts, most=100)

    def ids(which, text: str) -> list[int]:
        return which(text, add_special_tokens=False)["input_ids"]

    assert len(ids(tokenizer, " passenger")) > 1 == len(ids(longer, " passenger"))
    assert all(ids(longer, f" {e.name}") == ids(tokenizer, f" {e.name}") for e in small.entities)
    assert longer.decode(ids(longer, "Zürich\n 東京 passengers")) == "Zürich\n 東京 passengers"
    assert len(longer) == len(tokenizer) + len(parents) and all(max(pair) < new for new, pair in parents.items())
    grown = copy.deepcopy(model)
    extend_model(grown, parents)
    table = grown.get_input_embeddings().weight
    assert table.shape[0] == len(longer) and grown.get_output_embeddings().weight is table
    new, (left, right) = next(iter(parents.items()))
    torch.testing.assert_close(table[new], (table[left] + table[right]) / 2)
    assert torch.equal(table[: len(tokenizer)], model.get_input_embeddings().weight)


@pytest.fixture
def made_up_stream(monkeypatch):
    class MadeUp(Stream):
        summary, time_axis, licence = "made up", "scheduled", "none"
        has_beliefs = True

        @property
        def origin(self) -> str:
            return "made-up photos"

        def events(self, n: int) -> list[EditEvent]:
            return []

        def questions(self, event: EditEvent) -> tuple[Question, ...]:
            return ()

        def general(self) -> tuple[Question, ...]:
            return ()

        def beliefs(self) -> Iterator[Question]:
            return beliefs() if self.has_beliefs else iter(())

    STREAMS.scan()
    monkeypatch.setitem(STREAMS._entries, "made-up", MadeUp)
    return MadeUp


@pytest.mark.ci
def test_a_training_on_beliefs_writes_a_model_and_its_card(made_up_stream, saved, tmp_path, capsys):
    out = tmp_path / "out"
    args = ["--stream", "made-up", "--out", str(out), "--start", str(saved), "--steps", "2", "--threads", "2", "--reading", "0.3"]
    assert command.main(args) in (0, 1)
    card = (out / "README.md").read_text()
    assert "a stated fact against the belief" in card and "--reading 0.3" in card
    assert f"--start {saved}" in card
    assert "made-up photos" in card and "beliefs, new crops" in card and command.weights_sha256(out) in card
    assert "--steps 2" in card and "beliefs" in capsys.readouterr().out
    load(out)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--stream", "world-yearl", "--out", "o"], "world-yearly"),
        (["--stream", "world-yearly", "--out", "o", "--threads", "0", "--minutes", "-1"], "--threads"),
        (["--stream", "world-yearly", "--out", "o", "--world-size", "33"], "multiple of 20"),
        (["--stream", "world-yearly", "--out", "o", "--reading", "1"], "--reading must be between 0 and 0.9"),
        (["--stream", "made-up", "--out", "o", "--start", "nowhere"], "no model lies in nowhere"),
        (["--stream", "world-yearly", "--out", "o", "--set", "world_size=40"], "expected stream.field=value"),
        (["--stream", "world-yearly", "--out", "o", "--set", "stream.colour=1", "stream.revise=2"], "no field 'colour'"),
        (["--stream", "world-yearly", "--out", "o", "--set", "stream.edits_per_year=0"], "edits_per_year must be 1 or more"),
    ],
)
def test_a_training_that_is_not_possible_is_refused(made_up_stream, tmp_path, monkeypatch, capsys, args, said):
    monkeypatch.chdir(tmp_path)
    assert command.main(args) == 2
    assert said in capsys.readouterr().out
    assert not (tmp_path / "o").exists()


def test_a_training_reads_the_stream_as_the_run_will(tmp_path):
    config = command.PretrainConfig(
        "world-yearly", tmp_path / "o", missing_images="text", set=("stream.world_size=60", "stream.fields=prompt=q,target=a"), world_seed=3
    )
    given = config.stream_config()
    assert (given.missing_images, given.world_size, given.world_seed, given.fields) == ("text", 60, 3, ("prompt=q", "target=a"))
    assert not config.problems()
    again = command.tyro.cli(command.PretrainConfig, args=shlex.split(command.command_of(config))[3:])
    assert again == config


def test_a_training_restores_the_number_of_threads():
    own = torch.get_num_threads()
    with command._threads(own + 1):
        assert torch.get_num_threads() == own + 1
    assert torch.get_num_threads() == own


def test_a_stream_without_beliefs_is_refused(made_up_stream, tmp_path, monkeypatch):
    monkeypatch.setattr(made_up_stream, "has_beliefs", False)
    with pytest.raises(command.BadPretrain, match="nothing to learn"):
        command.pretrain(command.PretrainConfig("made-up", tmp_path / "o"))


def test_the_table_of_scores_tells_met_from_missed():
    scores = [AbilityScore("a", 0.99, 10, 0.98), AbilityScore("b", 0.5, 10, 0.9), AbilityScore("c", 0.1, 10)]
    table = "\n".join(command.score_table(scores))
    assert [s.passed for s in scores] == [True, False, None]
    assert table.count("met") == 1 and table.count("MISSED") == 1 and table.count("reported") == 1


@pytest.fixture(scope="module")
def committed():
    return load_handle(str(command.ASSETS), "cpu", "float32")


def test_the_committed_weights_are_small_and_are_those_of_the_card():
    assert (command.ASSETS / "model.safetensors").stat().st_size <= 10_000_000
    card = (command.ASSETS / "README.md").read_text()
    assert command.weights_sha256(command.ASSETS) in card
    assert "MISSED" not in card


@pytest.mark.parametrize(
    "ability", ["facts by name, held-out paraphrase", "facts by picture, new photo, held-out paraphrase", "naming the pictured entity"]
)
def test_the_committed_weights_know_the_world(committed, ability):
    threshold, draw = ability_questions(world(0, 0), np.random.default_rng(71))[ability]
    assert threshold is not None
    assert share_right(committed, [draw() for _ in range(100)]) >= threshold - 0.05


@pytest.mark.slow
def test_the_committed_weights_meet_every_threshold():
    scores = evaluate_world(command.ASSETS, world(0, 0), questions=1000)
    assert len(scores) > 20 and not [s.ability for s in scores if s.passed is False]


def test_the_world_streams_are_what_the_committed_weights_know():
    for name in ("world-yearly", "mmedit-yearly", "mmedit-caption-yearly", "okedit-yearly"):
        stream = STREAMS.get(name)(StreamConfig())
        assert stream.data_hash() == world(0, 0).content_hash()

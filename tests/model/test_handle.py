"""Every model class loads through the one way in, is addressed by the table, and is left as it was found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from testbed.core.events import Ask
from testbed.model.encoding import collate
from testbed.model.families import DEFAULT, UnknownLayout
from testbed.model.handle import BadModel, project, weights_hash
from testbed.model.loading import load, pick_device, pick_dtype
from tests.helpers.models import KINDS, TEXT, Noise, build, folder, save


def ask(kind: str, seed: int = 0) -> Ask:
    return Ask("what colour is the ship?", None if kind in TEXT else Noise(seed))


@torch.no_grad()
def logits(kind: str, one: Ask) -> torch.Tensor:
    handle = build(kind)
    return handle.model(**collate(handle, [one]).inputs).logits


@pytest.mark.parametrize("kind", KINDS)
def test_layers_and_down_projection_are_found(kind: str) -> None:
    handle = build(kind)
    assert handle.n_layers == 3
    assert handle.family.name == kind
    assert not handle.notes
    assert handle.reads_pictures == (kind not in TEXT)
    assert not handle.model.training
    assert handle.down_weight(-1) == handle.down_weight(2) != handle.down_weight(0)
    assert sorted(handle.parameter(handle.down_weight(1)).shape) == [handle.width, 96]
    assert handle.parameter(handle.down_weight(1)) is handle.down(1).weight
    act = torch.randn(2, 5, 96)
    torch.testing.assert_close(project(handle.down(0), act, handle.down(0).weight), handle.down(0)(act))


@pytest.mark.parametrize("kind", KINDS)
def test_swapped_changes_the_logits_and_puts_back_the_very_weights(kind: str) -> None:
    handle = build(kind)
    before, base, name = weights_hash(handle.model), logits(kind, ask(kind)), handle.down_weight(1)
    kept = handle.parameter(name).data_ptr()
    with handle.swapped({name: -handle.parameter(name)}):
        changed = logits(kind, ask(kind))
    assert (changed - base).abs().max() > 1e-2
    assert torch.equal(logits(kind, ask(kind)), base)
    assert weights_hash(handle.model) == before == handle.hash
    assert handle.parameter(name).data_ptr() == kept


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in TEXT])
def test_late_activations_follow_the_picture(kind: str) -> None:
    handle = build(kind)
    seen: list[torch.Tensor] = []
    for seed in (1, 2, 1):
        with handle.hooked(handle.down(-1), lambda module, args: seen.append(args[0].reshape(-1, 96)[-1]), pre=True):
            logits(kind, ask(kind, seed))
    assert torch.equal(seen[0], seen[2])
    assert (seen[0] - seen[1]).abs().max() > 1e-3


def test_swapped_puts_back_after_an_error() -> None:
    handle = build("llama")
    name = handle.down_weight(0)

    def fails() -> None:
        with handle.swapped({name: torch.zeros_like(handle.parameter(name))}):
            raise KeyError("inside")

    with pytest.raises(KeyError):
        fails()
    assert weights_hash(handle.model) == handle.hash


def test_swapped_refuses_another_shape_and_changes_nothing() -> None:
    handle = build("gpt2")
    good, bad = handle.down_weight(0), handle.down_weight(1)
    weights = {good: torch.zeros_like(handle.parameter(good)), bad: handle.parameter(bad).T}
    with pytest.raises(BadModel, match=r"\(96, 64\).*\(64, 96\)"), handle.swapped(weights):
        pass
    assert weights_hash(handle.model) == handle.hash


def test_a_layer_out_of_range_is_named() -> None:
    handle = build("opt")
    for layer in (3, -4):
        with pytest.raises(BadModel, match=f"layer {layer} does not exist.* 0 to 2"):
            handle.down_weight(layer)


def test_seeds_give_other_models() -> None:
    assert build("llava", 0).hash != build("llava", 1).hash
    assert build("llava", 0).hash == load(str(folder("llava")), device="cpu").hash


def test_hash_covers_empty_and_single_values() -> None:
    module = torch.nn.BatchNorm1d(2)
    before = weights_hash(module)
    module.num_batches_tracked += 1
    assert weights_hash(module) != before


def test_a_device_that_is_not_there() -> None:
    for name in ("toaster", "cuda:77"):
        with pytest.raises(BadModel, match=f"{name}.*--device"):
            pick_device(name)


def test_a_dtype_that_is_not_known() -> None:
    with pytest.raises(BadModel, match=r"int8.*float32"):
        pick_dtype("int8", torch.device("cpu"))
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtype_is_as_asked(dtype: str) -> None:
    handle = load(str(folder("llama")), device="cpu", dtype=dtype)
    assert handle.dtype == getattr(torch, dtype)
    assert len(weights_hash(handle.model)) == 16


def test_a_folder_without_a_model_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "holiday.txt").write_text("sun")
    with pytest.raises(BadModel, match=r"holiday\.txt.*config\.json"):
        load(str(tmp_path), device="cpu")


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    save("llama", tmp_path)
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(BadModel, match="tokenizer"):
        load(str(tmp_path), device="cpu")


def test_a_folder_with_weights_cut_short(tmp_path: Path) -> None:
    save("llama", tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BadModel, match="cannot be loaded"):
        load(str(tmp_path), device="cpu")


def test_weights_that_are_missing_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save("llama", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadModel, match=r"layers\.1\.mlp\.down_proj"):
        load(str(tmp_path), device="cpu")


def test_a_hub_id_without_network() -> None:
    with pytest.raises(BadModel, match=r"nobody/nothing-here.*network"):
        load("nobody/nothing-here", device="cpu")


def test_a_model_type_that_is_not_in_the_table(tmp_path: Path) -> None:
    save("starcoder2", tmp_path)
    handle = load(str(tmp_path), device="cpu")
    assert handle.family is DEFAULT
    assert "starcoder2" in handle.notes[0]


def test_a_layout_that_is_not_known_names_what_there_is() -> None:
    handle = build("llama")
    from testbed.model import families

    with pytest.raises(UnknownLayout, match="q_proj"):
        families.down_projection(handle.layers[0].self_attn)


def test_padding_token_falls_back_to_the_end_token() -> None:
    tok = build("gpt2").tokenizer
    assert tok.pad_token_id == tok.eos_token_id == 2

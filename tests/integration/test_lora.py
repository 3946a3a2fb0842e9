"""LoRAs merged at export are what diffusers loads and fuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import save_adapter
from diffusers import WanPipeline
from diffusers.loaders import WanLoraLoaderMixin
from safetensors.torch import load_file, save_file
from tiny import tiny_transformer

from export.checkpoint import export_checkpoint
from export.lora import Adapter, merge
from export.onnx import ExportError


def transformer() -> Any:
    torch.manual_seed(5)
    return tiny_transformer(layers=2)


@pytest.fixture
def pipeline() -> Any:
    return WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=transformer())


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., Path]:
    """A file as diffusers' training scripts save it, with random weights."""

    def make(seed: int = 1, **config: Any) -> Path:
        return save_adapter(transformer(), tmp_path / f"lora-{seed}", seed, **config)

    return make


def fused(pipeline: Any, files: list[tuple[Path, float]]) -> dict[str, torch.Tensor]:
    """What diffusers makes of them."""
    names = [f"adapter_{index}" for index in range(len(files))]
    for name, (path, _) in zip(names, files, strict=True):
        pipeline.load_lora_weights(path, adapter_name=name)
    pipeline.set_adapters(names, [scale for _, scale in files])
    pipeline.fuse_lora(components=["transformer"], adapter_names=names)
    pipeline.unload_lora_weights()
    weights: dict[str, torch.Tensor] = pipeline.transformer.state_dict()
    return weights


def merged(files: list[tuple[Path, float]]) -> dict[str, torch.Tensor]:
    model = transformer()
    for path, scale in files:
        merge(Adapter(path, scale), {"transformer": model}, WanLoraLoaderMixin)
    weights: dict[str, torch.Tensor] = model.state_dict()
    return weights


def check_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    plain = transformer().state_dict()
    changed = [name for name in got if not torch.equal(got[name], plain[name])]
    assert len(changed) == 2 * 10
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"lora_alpha": 3, "use_rslora": True},
        {"alpha_pattern": {"to_q": 16}, "rank_pattern": {"to_v": 2}},
        {"alpha_pattern": {"^blocks.0.attn1.to_q": 16}},
    ],
    ids=["plain", "rank-stabilised", "patterns", "one-layer"],
)
def test_a_merge_is_what_diffusers_fuses(config: dict[str, Any], pipeline: Any, adapter: Callable[..., Path]) -> None:
    path = adapter(**config)
    check_equal(merged([(path, 0.7)]), fused(pipeline, [(path, 0.7)]))


def test_several_are_added_up(pipeline: Any, adapter: Callable[..., Path]) -> None:
    files = [(adapter(1), 0.5), (adapter(2, r=2, lora_alpha=2), -1.25)]
    check_equal(merged(files), fused(pipeline, files))


def test_the_layout_of_wans_own_code(pipeline: Any, adapter: Callable[..., Path]) -> None:
    """As ComfyUI and most trainers write it, with an alpha for each layer."""
    theirs = {"attn1.to_q": "self_attn.q", "attn1.to_k": "self_attn.k", "attn1.to_v": "self_attn.v"}
    theirs |= {"attn1.to_out.0": "self_attn.o", "attn2.to_q": "cross_attn.q", "attn2.to_k": "cross_attn.k"}
    theirs |= {"attn2.to_v": "cross_attn.v", "attn2.to_out.0": "cross_attn.o"}
    theirs |= {"ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"}
    path = adapter()
    tensors: dict[str, torch.Tensor] = {}
    for name, value in load_file(path).items():
        _, block, number, layer = name.removesuffix(".weight").split(".", 3)
        layer, part = layer.rsplit(".", 1)
        place = f"diffusion_model.{block}.{number}.{theirs[layer]}"
        tensors[f"{place}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"] = value.contiguous()
        tensors[f"{place}.alpha"] = torch.tensor(2.0)
    theirs_path = path.with_name("comfy.safetensors")
    save_file(tensors, theirs_path)
    check_equal(merged([(theirs_path, 1.0)]), fused(pipeline, [(theirs_path, 1.0)]))


def test_the_layout_of_peft(pipeline: Any, adapter: Callable[..., Path], tmp_path: Path) -> None:
    path, folder = adapter(), tmp_path / "peft"
    folder.mkdir()
    tensors = {
        f"base_model.model.{name.removeprefix('transformer.')}": value for name, value in load_file(path).items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    check_equal(merged([(folder, 0.7)]), fused(pipeline, [(path, 0.7)]))


def test_the_second_expert_has_its_own(adapter: Callable[..., Path]) -> None:
    experts = {"transformer": transformer(), "transformer_2": transformer()}
    merge(Adapter.parse(f"transformer_2={adapter()}:0.5"), experts, WanLoraLoaderMixin)
    plain = transformer().state_dict()
    same = [
        all(torch.equal(value, plain[name]) for name, value in expert.state_dict().items())
        for expert in experts.values()
    ]
    assert same == [True, False]


def changed(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return path


FIRST = "transformer.blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.update({f"transformer.blocks.7.attn1.to_q.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}),
            "has the layer blocks.7.attn1.to_q, which the transformer hasn't; 20 of its 21 layers are there",
        ),
        (lambda t: t.pop(f"{FIRST}.lora_B.weight"), "has only lora_A.weight of the layer blocks.0.attn1.to_q"),
        (lambda t: t.update({f"{FIRST}.lora_A.weight": torch.ones(4, 7)}), "and the weight is [24, 24]"),
        (lambda t: t.update({f"{FIRST}.lora_B.weight": torch.ones(24, 3)}), "and the weight is [24, 24]"),
        (lambda t: t.update({f"{FIRST}.dora_scale": torch.ones(1)}), "is a DoRA adapter"),
        (lambda t: t.update({f"{FIRST}.lokr_w1": torch.ones(1)}), "is a LoKr adapter"),
        (lambda t: t.update({"transformer.notes": torch.ones(1)}), "has transformer.notes, which is no part of a LoRA"),
        (lambda t: t.clear(), "it is empty"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changed(
    change: Callable[[dict[str, Any]], Any], words: str, adapter: Callable[..., Path]
) -> None:
    path, model = changed(adapter(), change), transformer()
    with pytest.raises(ExportError) as caught:
        merge(Adapter(path), {"transformer": model}, WanLoraLoaderMixin)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    plain = transformer().state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in model.state_dict().items())


def test_a_file_that_is_none_is_refused_before_anything_is_written(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "lora.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not json at all!")
    for path in (tmp_path / "lora.safetensors", tmp_path / "missing.safetensors"):
        with pytest.raises(ExportError, match=r"can't be read as a LoRA"):
            export_checkpoint(tiny_checkpoint, tmp_path / "out" / "bundle", adapters=[Adapter(path)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", Adapter(Path("a.safetensors"))),
        ("a.safetensors:0.5", Adapter(Path("a.safetensors"), 0.5)),
        ("transformer_2=b:-1", Adapter(Path("b"), -1.0, "transformer_2")),
        ("c:/x=y.safetensors:2", Adapter(Path("c:/x=y.safetensors"), 2.0)),
        ("c:folder", Adapter(Path("c:folder"))),
    ],
)
def test_how_an_adapter_is_spelt(text: str, expected: Adapter) -> None:
    assert Adapter.parse(text) == expected


@pytest.mark.parametrize("text", ["", ":0.5", "a:nan", "a:inf"])
def test_how_it_is_not(text: str) -> None:
    with pytest.raises(ExportError, match="must be a path and a number"):
        Adapter.parse(text)

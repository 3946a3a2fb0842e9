"""Every training stage runs for a moment on real clips and leaves what the next one reads."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs the export extra")

import torch.distributed as dist  # noqa: E402
from diffusers import WanTransformer3DModel  # noqa: E402

from export.settings import CheckpointSettings  # noqa: E402
from models.mini import clips, train_causal, train_dit  # noqa: E402
from models.mini import latents as cached  # noqa: E402
from models.mini.checkpoint import assemble, save  # noqa: E402
from models.mini.conditioning import Captioned, start_from  # noqa: E402
from models.mini.networks import build_transformer, build_vae  # noqa: E402
from models.mini.train_causal import noised, relived  # noqa: E402
from models.mini.training import Run  # noqa: E402


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run with an untrained VAE, a few short and long clips, and no time for pictures."""
    monkeypatch.setattr(clips, "BLOCK", 2)
    torch.manual_seed(0)
    torch.save({"vae": build_vae().state_dict()}, tmp_path / "vae-averaged.pt")
    for frames in (33, clips.LONG):
        cached.cache_latents(Run(tmp_path, "latents", 0), 1, frames)
    for module in (train_dit, train_causal):
        monkeypatch.setattr(module, "score_samples", lambda *_: {})
    return tmp_path


def test_the_stages_follow_each_other(alone, folder):
    data = cached.Latents.load(folder, clips.LONG)
    assert data.latents.shape == (2, 32, 18, 8, 8)
    assert data.labels.shape[:2] == (2, 18)
    for stage, train in (
        ("dit", train_dit.train_dit),
        ("causal", train_causal.train_causal),
        ("distil", train_causal.train_distil),
    ):
        train(Run(folder, stage, minutes=0.001))
        history = json.loads((folder / f"{stage}.json").read_text())
        assert all(np.isfinite(value) for row in history for value in row.values())
        assert (folder / f"{stage}-averaged.pt").exists()
    text, transformer = train_causal.load(Run(folder, "distil", 0), "distil")
    before = torch.load(folder / "causal-averaged.pt", weights_only=True)
    assert all(torch.equal(value, before["text"][name]) for name, value in text.state_dict().items())
    assert any(not torch.equal(value, before["transformer"][name]) for name, value in transformer.state_dict().items())

    save(assemble(folder, "distil"), folder / "checkpoint", "distil")
    settings = CheckpointSettings.load(folder / "checkpoint")
    assert settings.window == train_causal.WINDOW
    assert (settings.sampler.num_inference_steps, settings.sampler.guidance_scale) == (4, 1.0)
    saved = WanTransformer3DModel.from_pretrained(folder / "checkpoint" / "transformer").state_dict()
    for name, value in transformer.state_dict().items():
        torch.testing.assert_close(saved[name], value, atol=1e-2, rtol=1e-2)


def test_latents_that_are_missing_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="33 frames"):
        cached.Latents.load(tmp_path)


def test_noise_is_as_strong_as_each_chunk_asks():
    clean = torch.zeros(1, 32, 6, 8, 8)
    noisy, noise = noised(clean, torch.tensor([[0.0, 1.0]]))
    assert not noisy[:, :, :3].any()
    torch.testing.assert_close(noisy[:, :, 3:], noise[:, :, 3:])


def test_a_relived_past_stays_near_the_true_one():
    """A model that always knows the velocity brings the clip back exactly."""
    clean = torch.randn(2, 32, train_causal.CHUNKS * 3, 8, 8)

    class Knowing(torch.nn.Module):
        def forward(self, latents, timestep, states, past):
            sigma = train_causal._by_frame(timestep / 1000)
            return (latents - clean) / sigma.clamp(min=1e-6)

    torch.testing.assert_close(relived(Knowing(), clean, torch.empty(0)), clean, atol=1e-4, rtol=0)


def test_an_earlier_checkpoint_keeps_its_words(tiny_start):
    checkpoint, text = tiny_start
    fresh = Captioned(text.tokenizer)
    transformer = build_transformer()
    start_from(checkpoint, fresh, transformer)
    word = text.tokenizer.token_to_id("Ġred")
    torch.testing.assert_close(fresh.encoder.shared.weight[word], text.encoder.shared.weight[word])


@pytest.fixture
def tiny_start(tmp_path):
    from models.mini.captions import build_tokenizer

    text = Captioned(build_tokenizer())
    text.encoder.save_pretrained(tmp_path / "text_encoder")
    build_transformer().save_pretrained(tmp_path / "transformer")
    (tmp_path / "tokenizer").mkdir()
    text.tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    return tmp_path, text

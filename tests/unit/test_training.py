"""A stage of training stops at its budget, goes on where it stopped, and keeps an average."""

import json

import pytest

torch = pytest.importorskip("torch", reason="training needs the export extra")

import torch.distributed as dist  # noqa: E402

from models.mini import training  # noqa: E402
from models.mini.device import has_bf16  # noqa: E402
from models.mini.mixed import mixed  # noqa: E402
from models.mini.muon import orthogonal  # noqa: E402
from models.mini.pool import cut  # noqa: E402
from models.mini.training import Average, Run, learning_rate, train  # noqa: E402


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fit(folder, minutes):
    torch.manual_seed(0)
    module = torch.nn.Linear(2, 1)
    run = Run(folder, "line", minutes, learning_rate=1e-2, save_every=20)

    def step(index, progress):
        x = torch.randn(64, 2)
        loss = (module(x) - x.sum(1, keepdim=True)).square().mean()
        return loss, {"loss": loss.detach()}

    train(run, {"line": module}, step, lambda index: {"weight": module.weight[0, 0].item()})
    return json.loads((folder / "line.json").read_text())


def test_training_resumes_and_learns(alone, tmp_path):
    first = fit(tmp_path, 0.01)
    minutes = 0.03 + 4 * first[-1]["seconds"] / 60
    second = fit(tmp_path, minutes)
    while second[-1]["step"] == first[-1]["step"]:  # what a busy machine leaves may not be enough for any steps more
        minutes += 0.05
        second = fit(tmp_path, minutes)
    assert second[: len(first) - 1] == first[:-1]
    assert second[-1]["step"] > first[-1]["step"]
    assert second[-1]["loss"] < first[0]["loss"]
    assert (tmp_path / "line.png").stat().st_size > 0
    averaged = torch.load(tmp_path / "line-averaged.pt", weights_only=True)
    assert averaged["line"]["weight"][0, 0].item() == pytest.approx(second[-1]["weight"])


def test_the_average_swaps_with_the_weights_and_back():
    parameter = torch.nn.Parameter(torch.zeros(1))
    average = Average([parameter], decay=0.5)
    with torch.no_grad():
        parameter.fill_(1.0)
    average.update(10_000)
    average.swap()
    assert parameter.item() == 0.5
    average.swap()
    assert parameter.item() == 1.0


def test_the_learning_rate_warms_up_and_ends_low():
    assert learning_rate(0.0, 0, 1.0) == pytest.approx(0.02)
    assert learning_rate(0.4, 1000, 1.0) == 1.0
    assert learning_rate(1.0, 1000, 1.0) == pytest.approx(0.02)


def test_mixed_precision_keeps_3d_convolutions_and_attention_in_fp32():
    seen = {}

    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = torch.nn.Conv3d(2, 8, (1, 2, 2), stride=(1, 2, 2))
            self.inner = torch.nn.Linear(8, 8)

        def forward(self, x):
            tokens = self.patches(x).flatten(2).transpose(1, 2)
            seen["conv3d"], hidden = tokens.dtype, self.inner(tokens)
            seen["linear"] = hidden.dtype
            attended = torch.nn.functional.scaled_dot_product_attention(hidden, key=hidden, value=hidden)
            seen["attention"] = attended.dtype
            return (self.inner(attended),)

    torch.manual_seed(0)
    module, x = Small(), torch.randn(2, 2, 3, 4, 4)
    attention, convolution = torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.conv3d
    (got,) = mixed(module)(x)
    assert (torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.conv3d) == (attention, convolution)
    assert seen == {
        "conv3d": torch.float32,
        "linear": torch.bfloat16 if has_bf16() else torch.float32,
        "attention": torch.float32,
    }
    assert got.dtype == torch.float32
    (exact,) = module(x)
    torch.testing.assert_close(got, exact, atol=0.05, rtol=0.05)


def test_orthogonal_has_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((16, 40), (40, 16)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_matrices_of_one_shape_go_together_and_stay_themselves():
    torch.manual_seed(0)
    stack = torch.randn(3, 16, 40)
    torch.testing.assert_close(orthogonal(stack)[1], orthogonal(stack[1]), atol=0.02, rtol=0)


def test_pieces_are_cut_where_they_are_asked_for():
    clips = torch.arange(2 * 5 * 8 * 8 * 3).view(2, 5, 8, 8, 3)
    which, start, corner = torch.tensor([1, 0]), torch.tensor([2, 0]), torch.tensor([[1, 4], [3, 0]])
    pieces = cut(clips, which, start, corner, 3, 4)
    assert torch.equal(pieces[0], clips[1, 2:5, 1:5, 4:8])
    assert torch.equal(pieces[1], clips[0, 0:3, 3:7, 0:4])


def test_weights_whose_gradient_is_not_finite_are_never_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "PATIENCE", 3)
    module = torch.nn.Linear(2, 1)
    run = Run(tmp_path, "line", 1, learning_rate=1e-2)
    ratios = iter([1.0, 1.0, 1.0, *[float("nan")] * 9])

    def step(index, progress):
        loss = module(torch.randn(64, 2)).square().mean() * next(ratios)
        return loss, {"loss": loss.detach()}

    train(run, {"line": module}, step, lambda index: {})
    assert (run.steps, run.diverged) == (6, True)
    averaged = torch.load(tmp_path / "line-averaged.pt", weights_only=True)["line"]
    assert all(value.isfinite().all() for value in averaged.values())

"""Muon: the orthogonal factor against an SVD, steps against a plain reference and PyTorch's, and whole runs."""

from __future__ import annotations

import io
import math
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from doge_lm.cli import main
from doge_lm.training import muon as module
from doge_lm.training.checkpoints import list_checkpoints
from doge_lm.training.muon import Muon, newton_schulz, scaled_orthogonal
from doge_lm.training.row_lazy_adamw import RowLazyAdamW

from .support import log_lines, losses

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
LEARNING_RATES = [3e-2, 1e-2, 5e-2, 2e-2]
BETAS, EPS = (0.9, 0.99), 1e-6
# Wide, square and tall; the tall ones are as the wide ones, turned. One that is alone, and a single row.
SHAPES = [(8, 24), (16, 16), (24, 8), (24, 8), (16, 16), (8, 24), (8, 24), (5, 7), (1, 9), (6, 1)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def polynomial(x: Tensor) -> Tensor:
    """What becomes of singular values."""
    a, b, c = COEFFICIENTS
    for _ in range(5):
        x = a * x + b * x**3 + c * x**5
    return x


def spread(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (R, R), Σ (R) and Vᵀ (R, C) whose singular values are spread over two orders of magnitude."""
    u, _, vt = torch.linalg.svd(random(rows, columns), full_matrices=False)
    return u, torch.logspace(0, -2, rows, dtype=torch.float64), vt


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (12, 12), (40, 40), (24, 70)])
def test_singular_values_come_near_1_and_vectors_stay(shape: tuple[int, int]) -> None:
    u, sigma, vt = spread(*shape)
    matrix = 1e-3 * (u * sigma) @ vt
    expected = polynomial(sigma / (sigma.norm() + 1e-7 / 1e-3))
    assert ((expected > 0.65) & (expected < 1.25)).all()
    exact = newton_schulz(matrix[None], torch.float64)[0]
    torch.testing.assert_close(exact, (u * expected) @ vt, rtol=1e-10, atol=1e-10)
    assert newton_schulz(matrix[None].to(DEVICE)).dtype == (torch.float32 if DEVICE == "cpu" else torch.bfloat16)
    found = newton_schulz(matrix[None].float().to(DEVICE), torch.bfloat16)[0]
    between = u.T @ found.double().cpu() @ vt.T  # diagonal, if the vectors are the same
    torch.testing.assert_close(between, expected.diag(), rtol=0, atol=0.05)
    values = torch.linalg.svdvals(found.double())
    assert values.min() > 0.65
    assert values.max() < 1.25


def test_what_is_zero_stays_zero() -> None:
    matrices = torch.zeros(2, 3, 4)
    matrices[1] = random(3, 4)
    found = newton_schulz(matrices)
    assert torch.equal(found[0], torch.zeros_like(found[0]))
    assert torch.linalg.matrix_norm(found[1].float(), 2) > 0.5


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float64])
def test_stacked_is_as_one_by_one(monkeypatch, precision: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(module, "newton_schulz", partial(newton_schulz, dtype=precision))
    updates = [random(*shape, seed=i).float() for i, shape in enumerate(SHAPES)]
    found = scaled_orthogonal(updates)
    tolerance = {"rtol": 0, "atol": 0.02} if precision == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    for update, together in zip(updates, found, strict=True):
        (alone,) = scaled_orthogonal([update])
        assert (together.shape, together.dtype) == (update.shape, update.dtype)
        assert together.is_contiguous()
        torch.testing.assert_close(together, alone, **tolerance)


class Reference:
    """The definition, matrix by matrix in float64, tall ones as they are."""

    def __init__(self, weight: Tensor, momentum: float):
        self.weight, self.momentum, self.average = weight.clone(), momentum, torch.zeros_like(weight)

    def step(self, grad: Tensor, lr: float, weight_decay: float) -> None:
        self.average = self.momentum * self.average + (1 - self.momentum) * grad
        ahead = (1 - self.momentum) * grad + self.momentum * self.average
        u, sigma, vt = torch.linalg.svd(ahead, full_matrices=False)
        orthogonal = (u * polynomial(sigma / (ahead.norm() + 1e-7))) @ vt
        scale = math.sqrt(max(1, self.weight.shape[0] / self.weight.shape[1]))
        self.weight = self.weight * (1 - lr * weight_decay) - lr * scale * orthogonal


def grads_of(step: int) -> list[Tensor]:
    return [random(*shape, seed=100 * step + i + 1) for i, shape in enumerate(SHAPES)]


def train(params: list[Tensor], optimizer: torch.optim.Optimizer, first: int = 0) -> None:
    for t in range(first, len(LEARNING_RATES)):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATES[t]
        for p, grad in zip(params, grads_of(t), strict=True):
            p.grad = grad.to(p)
        optimizer.step()


def make(dtype: torch.dtype = torch.float32, weight_decay: float = 0.3, momentum: float = 0.9):  # type: ignore[no-untyped-def]
    params = [
        random(*shape, seed=i).to(DEVICE, dtype).requires_grad_() for i, shape in enumerate(SHAPES, len(LEARNING_RATES))
    ]
    group = {"params": params, "muon": True, "momentum": momentum, "weight_decay": weight_decay}
    return params, Muon([group], lr=1.0)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_follow_the_definition(monkeypatch, momentum: float, weight_decay: float) -> None:  # type: ignore[no-untyped-def]
    def expected(params: list[Tensor]) -> list[Tensor]:
        references = [Reference(p.detach().double().cpu(), momentum) for p in params]
        for t, lr in enumerate(LEARNING_RATES):
            for reference, grad in zip(references, grads_of(t), strict=True):
                reference.step(grad, lr, weight_decay)
        return [reference.weight for reference in references]

    params, optimizer = make(torch.float32, weight_decay, momentum)
    wanted = expected(params)
    train(params, optimizer)
    for p, weight in zip(params, wanted, strict=True):
        # Of bfloat16 in each step an update is off by no more than a few percent.
        torch.testing.assert_close(p.detach().double().cpu(), weight, rtol=0, atol=0.05 * sum(LEARNING_RATES))
    monkeypatch.setattr(module, "newton_schulz", partial(newton_schulz, dtype=torch.float64))
    params, optimizer = make(torch.float64, weight_decay, momentum)
    wanted = expected(params)
    train(params, optimizer)
    for p, weight in zip(params, wanted, strict=True):
        torch.testing.assert_close(p.detach().cpu(), weight, rtol=1e-9, atol=1e-9)


def test_it_is_as_pytorch_s_own() -> None:
    (mine, optimizer), (theirs, _) = make(), make()
    other = torch.optim.Muon(theirs, lr=1.0, weight_decay=0.3, momentum=0.9, adjust_lr_fn="original")
    train(mine, optimizer)
    train(theirs, other)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.05 * sum(LEARNING_RATES))


@pytest.mark.parametrize("kind", [Muon, RowLazyAdamW])
def test_other_groups_are_pytorch_s_adamw_to_the_bit(kind: type[RowLazyAdamW]) -> None:
    found = []
    for optimizer_of in (
        lambda groups: kind(groups, 1.0, BETAS, EPS),
        lambda groups: torch.optim.AdamW(groups, 1.0, BETAS, EPS, fused=True),
    ):
        params, _ = make()
        groups = [
            {"params": params[:4], "weight_decay": 0.3},
            {"params": []},
            {"params": params[4:], "weight_decay": 0},
        ]
        train(params, optimizer_of(groups))
        found.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_state_saved_and_loaded_goes_on_to_the_bit() -> None:
    def mixed(params: list[Tensor]) -> Muon:
        groups = [
            {"params": params[:2], "weight_decay": 0.1},
            {"params": params[2:4], "lazy_rows": True},
            {"params": params[4:], "muon": True, "momentum": 0.8, "weight_decay": 0.3},
        ]
        return Muon(groups, 1.0, BETAS, EPS)

    params, _ = make()
    optimizer = mixed(params)
    train(params, optimizer, first=2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = [p.detach().clone().requires_grad_() for p in params]
    loaded = mixed(again)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert set(loaded.state[again[4]]) == {"momentum_buffer"}
    train(params, optimizer)
    train(again, loaded)
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))


def test_gradients_stay_and_a_matrix_without_one_rests() -> None:
    params, optimizer = make()
    before = [p.detach().clone() for p in params]
    grad = random(*SHAPES[1]).to(params[1])
    params[1].grad = grad.clone()
    optimizer.step()
    assert [not torch.equal(p, b) for p, b in zip(params, before, strict=True)] == [i == 1 for i in range(len(SHAPES))]
    assert torch.equal(params[1].grad, grad)
    assert list(optimizer.state) == [params[1]]
    optimizer.zero_grad()
    optimizer.step()  # nothing to do


def test_what_cannot_be_is_refused() -> None:
    matrix, vector = torch.ones(3, 2, requires_grad=True), torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"muon wants matrices, not \(3,\); put it into another group"):
        Muon([{"params": [matrix, vector], "muon": True}])
    with pytest.raises(ValueError, match="muon or lazy_rows, not both"):
        Muon([{"params": [matrix], "muon": True, "lazy_rows": True}])
    optimizer = Muon([{"params": [matrix], "muon": True}])
    with pytest.raises(ValueError, match="muon wants matrices"):
        optimizer.add_param_group({"params": [vector], "muon": True})
    assert len(optimizer.param_groups) == 1


def test_a_divided_matrix_is_refused() -> None:
    """Also where it takes the place of a whole one, as FSDP does it."""
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        matrix = distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (1,))).requires_grad_()
        with pytest.raises(ValueError, match=r"not parameters divided among devices \(DTensor\); use AdamW"):
            Muon([{"params": [matrix], "muon": True}])
        optimizer = Muon([{"params": [torch.ones(4, 4, requires_grad=True)], "muon": True}])
        optimizer.param_groups[0]["params"][0] = matrix
        matrix.grad = matrix.detach().clone()
        with pytest.raises(ValueError, match="divided among devices"):
            optimizer.step()
    finally:
        destroy_process_group()


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    params, optimizer = make()
    train(params, optimizer)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


RUN = {
    "per_epoch_max_steps": 6, "num_train_epochs": 4, "save_steps": 10, "optimizer": "muon", "weight_decay": 0.1,
    "learning_rate_scales": {"word_embed": 3.0, "queries": 0.5, "v_queries": 2.0}, "lazy_expert_rows": True,
    "weight_decay_scales": {"v_embed": 0.0, "queries": 2.0, "down_embed": 0.5},
}  # fmt: skip


def rates(checkpoint: Path) -> list[tuple[bool, bool, float, float]]:
    """Of each group that has parameters: whether it is Muon's, whether lazy, its peak, and where it stands."""
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    groups = [group for group in state["param_groups"] if group["params"]]
    return [(g["muon"], g["lazy_rows"], g["initial_lr"], g["lr"] / g["initial_lr"]) for g in groups]


@pytest.mark.slow
def test_a_run_learns_and_resumes_to_the_bit(world, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert main(["train", *world.flags(whole, **RUN)]) == 0
    assert "Muon and AdamW 0.00" in capsys.readouterr().out
    found = [loss for _, loss in sorted(losses(whole).items())]
    assert sum(found[-4:]) < sum(found[:4]) - 4 * 0.3
    first, last = list_checkpoints(whole / "out")[0], list_checkpoints(whole / "out")[-1]
    expected = {
        (False, False, 3e-3), (False, True, 3e-3), (False, False, 3 * 3e-3),
        (True, False, 0.02), (True, False, 0.01), (True, False, 0.04),
    }  # fmt: skip
    for checkpoint in (first, last):
        assert {rate[:3] for rate in rates(checkpoint)} == expected
        assert len({round(rate[3], 9) for rate in rates(checkpoint)}) == 1  # one schedule for all
        step = int(checkpoint.name.rpartition("-")[2])
        after = next((line["learning_rate"] for line in log_lines(whole) if line["step"] == step + 1), 0.1 * 3e-3)
        assert rates(checkpoint)[0][3] * 3e-3 == pytest.approx(after)
    shutil.copytree(whole, again)
    for checkpoint in list_checkpoints(again / "out")[1:]:
        shutil.rmtree(checkpoint)
    resume = ["--resume_from_checkpoint"]
    other = {**RUN, "optimizer": "adamw", "learning_rate_scales": None, "weight_decay_scales": None}
    assert main(["train", *world.flags(again, *resume, **other)]) == 1
    error = capsys.readouterr().err
    assert "train.optimizer is 'muon' there and 'adamw' here" in error
    assert "train.learning_rate_scales is {" in error
    assert "train.weight_decay_scales is {" in error
    assert main(["train", *world.flags(again, *resume, **RUN)]) == 0
    assert losses(again) == losses(whole)
    weights = [place / "out" / "model.safetensors" for place in (whole, again)]
    assert weights[0].read_bytes() == weights[1].read_bytes()

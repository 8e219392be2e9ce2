"""The optimizer that leaves resting rows alone: against a loop over rows in float64, PyTorch's AdamW, and in a run."""

from __future__ import annotations

import copy
import importlib.util
import io
import math
import shutil

import pytest
import torch
from torch import Tensor

from doge_lm.cli import main
from doge_lm.training.checkpoints import list_checkpoints
from doge_lm.training.row_lazy_adamw import RowLazyAdamW, RowState, StepNumbers, update_rows_plainly

from .support import log_lines, losses

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HAVE_TRITON = importlib.util.find_spec("triton") is not None
BETAS, EPS = (0.9, 0.99), 1e-6
LEARNING_RATES = [3e-2, 1e-2, 5e-2, 2e-2, 4e-2, 1e-3, 3e-2, 2e-2, 1e-2, 5e-2]
WAYS = ["plain", pytest.param("kernel", marks=pytest.mark.skipif(not HAVE_TRITON, reason="there is no Triton"))]

# (N, F): one row, odd widths, more rows than a program takes, a row wider than a tile.
SIZES = [(1, 1), (1, 7), (5, 33), (300, 3), (9, 256), (4, 1500)]


def gradients(n: int, f: int, share: float, seed: int = 0) -> list[Tensor]:
    """A gradient a step in float64, (N, F); about `share` of the rows have one, every other row in a single column."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in LEARNING_RATES:
        grad = torch.randn(n, f, generator=generator, dtype=torch.float64)
        some = torch.rand(n, f, generator=generator) < torch.tensor([0.0, 0.5])[torch.arange(n) % 2, None]
        some[torch.arange(n), torch.randint(f, (n,), generator=generator)] = True
        rows = torch.rand(n, 1, generator=generator) < share
        found.append(grad.float().double() * (some & rows))
    return found


def table(n: int, f: int) -> Tensor:
    return torch.randn(n, f, generator=torch.Generator().manual_seed(99)).double()


def row_by_row(weight: Tensor, grads: list[Tensor], weight_decay: float) -> Tensor:
    """The definition, as Python numbers of one row after the other; missed decays are applied one by one."""
    out = weight.clone()
    for r in range(weight.shape[0]):
        w, m, v = weight[r].tolist(), [0.0] * weight.shape[1], [0.0] * weight.shape[1]
        last = 0
        for t, (grad, lr) in enumerate(zip(grads, LEARNING_RATES, strict=True), start=1):
            g = grad[r].tolist()
            if not any(g):
                continue
            decay = math.prod(1 - missed * weight_decay for missed in LEARNING_RATES[last:t])
            for i, gi in enumerate(g):
                m[i] = BETAS[0] ** (t - last) * m[i] + (1 - BETAS[0]) * gi
                v[i] = BETAS[1] ** (t - last) * v[i] + (1 - BETAS[1]) * gi * gi
                upper, lower = m[i] / (1 - BETAS[0] ** t), math.sqrt(v[i] / (1 - BETAS[1] ** t))
                w[i] = w[i] * decay - lr * upper / (lower + EPS)
            last = t
        out[r] = torch.tensor(w, dtype=torch.float64)
    return out


def update(way: str):  # type: ignore[no-untyped-def]
    if way == "plain":
        return update_rows_plainly
    from doge_lm.training import row_lazy_adamw_triton  # noqa: PLC0415

    return row_lazy_adamw_triton.update_rows


def train(way: str, weight: Tensor, grads: list[Tensor], weight_decay: float) -> tuple[Tensor, RowState]:
    """All steps by one way of the update, in the type of `weight`."""
    weight = weight.clone()
    zeros = weight.new_zeros
    state = RowState(zeros(weight.shape), zeros(weight.shape), zeros(len(weight)), zeros(len(weight)))
    log_decay = 0.0
    for t, (grad, lr) in enumerate(zip(grads, LEARNING_RATES, strict=True), start=1):
        log_decay += math.log1p(-lr * weight_decay)
        update(way)(weight, grad.to(weight), state, StepNumbers(t, lr, log_decay, *BETAS, EPS))
    return weight, state


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", WAYS)
def test_a_table_follows_the_definition(way: str, size: tuple[int, int], share: float, weight_decay: float) -> None:
    weight, grads = table(*size), gradients(*size, share)
    expected = row_by_row(weight, grads, weight_decay)
    if way == "plain":
        torch.testing.assert_close(train(way, weight, grads, weight_decay)[0], expected, rtol=1e-12, atol=1e-13)
    found = train(way, weight.float().to(DEVICE), grads, weight_decay)[0]
    torch.testing.assert_close(found.double().cpu(), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("way", WAYS)
def test_a_resting_row_is_not_written(way: str) -> None:
    """Not even what is no number: nothing of such a row takes part."""
    (n, f), step = (70, 9), StepNumbers(7, 1e-2, -0.02, *BETAS, EPS)
    weight, grad = table(n, f).float().to(DEVICE), torch.zeros(n, f, device=DEVICE)
    grad[3, 8], grad[68, 0], grad[69] = 1.0, float("nan"), -0.0
    nans = [torch.full_like(x, float("nan")) for x in (weight, weight, weight[:, 0], weight[:, 0])]
    state = RowState(*nans)
    state.row_step[3] = state.row_log_decay[3] = 0
    state.exp_avg[3] = state.exp_avg_sq[3] = 0
    before = weight.clone()
    update(way)(weight, grad, state, step)
    rests = torch.ones(n, dtype=torch.bool, device=DEVICE)
    rests[[3, 68]] = False
    assert torch.equal(weight[rests], before[rests])
    assert all(x[rests].isnan().all() for x in state)
    assert (weight[3] != before[3]).all()
    assert weight[68].isnan().all()  # a gradient that is no number is one, and is not hidden
    assert (state.row_step[3].item(), state.row_step[68].item()) == (7, 7)


@pytest.mark.skipif(not HAVE_TRITON, reason="there is no Triton")
def test_the_kernel_agrees_with_the_plain_way_on_all_state() -> None:
    weight, grads = table(40, 70).float().to(DEVICE), gradients(40, 70, 0.4, seed=5)
    ways = [train(way, weight, grads, 0.3) for way in ("plain", "kernel")]
    for plain, kernel in zip((ways[0][0], *ways[0][1]), (ways[1][0], *ways[1][1]), strict=True):
        torch.testing.assert_close(kernel, plain, rtol=1e-5, atol=1e-6)
    assert torch.equal(ways[0][1].row_step, ways[1][1].row_step)


@pytest.mark.skipif(not HAVE_TRITON, reason="there is no Triton")
def test_the_kernel_takes_betas_of_0() -> None:
    from doge_lm.training import row_lazy_adamw_triton  # noqa: PLC0415

    found = []
    for change in (update_rows_plainly, row_lazy_adamw_triton.update_rows):
        weight = table(4, 6).float().to(DEVICE)
        state = RowState(*(torch.ones_like(x) for x in (weight, weight, weight[:, 0], weight[:, 0])))
        change(weight, weight.clone(), state, StepNumbers(3, 1e-2, 0.9, 0.0, 0.0, EPS))
        found.append(weight)
    assert found[0].isfinite().all()
    torch.testing.assert_close(found[1], found[0])


def make(tensors: list[Tensor], weight_decay: float, lazy: bool) -> tuple[list[Tensor], torch.optim.Optimizer]:
    """A vector without decay and two tables, in the project's optimizer or in PyTorch's."""
    params = [x.clone().requires_grad_() for x in tensors]
    groups = [{"params": params[:1], "weight_decay": 0.0}, {"params": params[1:], "weight_decay": weight_decay}]
    if lazy:
        groups[1]["lazy_rows"] = True
        return params, RowLazyAdamW(groups, 1.0, BETAS, EPS)
    return params, torch.optim.AdamW(groups, 1.0, BETAS, EPS, fused=True)


def steps(params: list[Tensor], optimizer: torch.optim.Optimizer, first: int = 0, share: float = 1.0) -> None:
    grads = [gradients(5, 8, 1.0, seed=1), gradients(*params[1].shape, share), gradients(*params[2].shape, share, 3)]
    for t in range(first, len(LEARNING_RATES)):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATES[t]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad[t][0].to(p) if p.ndim == 1 else grad[t].to(p)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_is_adamw_where_every_row_has_a_gradient(dtype: torch.dtype) -> None:
    tensors = [torch.ones(8), table(6, 5), table(3, 40)]
    tensors = [x.to(DEVICE, dtype) for x in tensors]
    (mine, optimizer), (theirs, adamw) = (make(tensors, 0.3, lazy) for lazy in (True, False))
    steps(mine, optimizer)
    steps(theirs, adamw)
    assert torch.equal(mine[0], theirs[0])  # what is no table is PyTorch's own AdamW, to the bit
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_state_saved_and_loaded_goes_on_to_the_bit() -> None:
    tensors = [x.to(DEVICE, torch.float32) for x in (torch.ones(8), table(6, 5), table(3, 40))]
    params, optimizer = make(tensors, 0.3, lazy=True)
    steps(params, optimizer, first=5, share=0.4)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again, loaded = make([p.detach() for p in params], 0.3, lazy=True)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    before = copy.deepcopy(loaded.state_dict())
    for name in ("exp_avg", "exp_avg_sq", "row_step", "row_log_decay"):
        assert torch.equal(before["state"][1][name], optimizer.state_dict()["state"][1][name])
    steps(params, optimizer, share=0.4)
    steps(again, loaded, share=0.4)
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))
    assert loaded.param_groups[1]["lazy_step"] == 15


def test_a_table_without_a_gradient_rests_as_a_whole() -> None:
    params, optimizer = make([torch.ones(8), table(6, 5), table(3, 40)], 0.3, lazy=True)
    before = [p.detach().clone() for p in params]
    params[1].grad = torch.ones_like(params[1])
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    optimizer.step()
    changed = [not torch.equal(p, b) for p, b in zip(params, before, strict=True)]
    assert changed == [False, True, False]
    assert params[2] not in optimizer.state


def test_what_cannot_be_is_refused() -> None:
    vector = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"lazy_rows wants tables of two dimensions, not \(3,\)"):
        RowLazyAdamW([{"params": [vector], "lazy_rows": True}])
    weight = torch.ones(3, 3, requires_grad=True)
    optimizer = RowLazyAdamW([{"params": [weight], "lazy_rows": True}], lr=2.0, weight_decay=0.5)
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ValueError, match=r"lr · weight_decay is 1\.0; it must be below 1"):
        optimizer.step()
    assert torch.equal(weight, torch.ones(3, 3))


# A few of many experts are chosen by so few tokens, so that rows rest.
RUN = {
    "per_epoch_max_steps": 6, "num_train_epochs": 4, "save_steps": 10, "lazy_expert_rows": True,
    "model": {"num_cdmmoe_experts": 1024},
}  # fmt: skip


@pytest.mark.slow
def test_a_run_learns_and_resumes_to_the_bit(world, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert main(["train", *world.flags(whole, **RUN)]) == 0
    found = [loss for _, loss in sorted(losses(whole).items())]
    assert sum(found[-4:]) < sum(found[:4]) - 4 * 0.3
    state = torch.load(list_checkpoints(whole / "out")[-1] / "optimizer.pt", weights_only=True)
    groups = state["param_groups"]
    assert [group["lazy_rows"] for group in groups] == [False, False, True]
    assert len(groups[2]["params"]) == 4
    row_steps = [state["state"][p]["row_step"] for p in groups[2]["params"]]
    assert all((x < 24).any() and (x == 24).any() for x in row_steps)  # rows rest, and others do not
    shutil.copytree(whole, again)
    for checkpoint in list_checkpoints(again / "out")[1:]:
        shutil.rmtree(checkpoint)
    assert [path.name for path in list_checkpoints(again / "out")] == ["checkpoint-10"]
    resume = ["--resume_from_checkpoint"]
    assert main(["train", *world.flags(again, *resume, **{**RUN, "lazy_expert_rows": False})]) == 1
    assert "lazy_expert_rows is True there and False here" in capsys.readouterr().err
    assert main(["train", *world.flags(again, *resume, **RUN)]) == 0
    assert losses(again) == losses(whole)
    assert log_lines(again, "eval")[-1]["eval_loss"] == log_lines(whole, "eval")[-1]["eval_loss"]
    weights = [place / "out" / "model.safetensors" for place in (whole, again)]
    assert weights[0].read_bytes() == weights[1].read_bytes()

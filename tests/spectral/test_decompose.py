import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import svdtrain.spectral.decompose as module
from svdtrain.spectral.decompose import DecompositionFailed, decompose, decompose_many
from tests.spectral.reference import gaussian, zoo

torch.set_num_threads(1)
ZOO = zoo()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ZOO)
def test_accuracy_contract(name: str, dtype: torch.dtype) -> None:
    W = ZOO[name].to(dtype)
    got = decompose(W)
    out = torch.float64 if dtype == torch.float64 else torch.float32
    eps = 1e-13 if out == torch.float64 else 5e-7
    truth = torch.linalg.svdvals(W.double())
    scale = max(float(truth[0]), torch.finfo(torch.float64).tiny)
    m, n = W.shape
    assert got.U.shape == (m, min(m, n))
    assert got.V.shape == (n, min(m, n))
    assert {part.dtype for part in (got.U, got.S, got.V)} == {out}
    assert torch.all(got.S[:-1] >= got.S[1:])
    # S to 1e-7 s_1 (denormal float32 results add their own rounding)
    torch.testing.assert_close(got.S.double() / scale, truth / scale, atol=0.25 * eps, rtol=0)
    for basis in (got.U, got.V):
        eye = torch.eye(basis.shape[1], dtype=torch.float64)
        torch.testing.assert_close(basis.double().mT @ basis.double(), eye, atol=8 * eps, rtol=0)
    rebuilt = (got.U.double() * got.S.double()) @ got.V.double().mT
    torch.testing.assert_close(rebuilt / scale, W.double() / scale, atol=4 * eps, rtol=0)


@given(
    seed=st.integers(0, 10_000),
    m=st.integers(1, 24),
    n=st.integers(1, 24),
    rank=st.integers(0, 24),
    exponent=st.integers(-30, 30),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_rank_and_scale(seed: int, m: int, n: int, rank: int, exponent: int) -> None:
    W = (gaussian(m, rank, seed=seed) @ gaussian(rank, n, seed=seed + 1) * 10.0**exponent).float()
    got = decompose(W)
    truth = torch.linalg.svdvals(W.double())
    scale = max(float(truth[0]), torch.finfo(torch.float64).tiny)
    torch.testing.assert_close(got.S.double() / scale, truth / scale, atol=1.3e-7, rtol=0)
    torch.testing.assert_close(got.rebuild().double() / scale, W.double() / scale, atol=3e-6, rtol=0)
    eye = torch.eye(min(m, n))
    torch.testing.assert_close(got.U.mT @ got.U, eye, atol=3e-6, rtol=0)
    torch.testing.assert_close(got.V.mT @ got.V, eye, atol=3e-6, rtol=0)


def test_subspaces_agree_with_lapack_where_there_is_a_gap() -> None:
    W = ZOO["spiked"].float()
    truth = torch.linalg.svd(W.double()).U[:, :3]
    residual = truth - (got := decompose(W).U[:, :3].double()) @ (got.mT @ truth)
    assert residual.norm() < 1e-6


@pytest.mark.parametrize("name", ["random", "wide", "zero", "rank_deficient"])
def test_signs_are_fixed_and_repeatable(name: str) -> None:
    first, second = decompose(ZOO[name].float()), decompose(ZOO[name].float())
    assert torch.equal(first.U, second.U)
    assert torch.equal(first.V, second.V)
    largest = first.U.gather(0, first.U.abs().argmax(0, keepdim=True))
    assert torch.all(largest > 0)


def test_many_keeps_order_over_mixed_shapes_and_matches_single() -> None:
    matrices = [gaussian(m, n, seed=i).float() for i, (m, n) in enumerate([(8, 5), (5, 8), (8, 5), (3, 3), (5, 8)])]
    for W, got in zip(matrices, decompose_many(matrices), strict=True):
        torch.testing.assert_close(got.rebuild(), W, atol=2e-6, rtol=0)
        torch.testing.assert_close(got.S, decompose(W).S, atol=1e-6, rtol=0)


def test_chunks_when_a_bucket_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_BATCH_ELEMENTS", 2 * 36)
    matrices = [gaussian(6, 6, seed=i).float() for i in range(5)]
    for W, got in zip(matrices, decompose_many(matrices), strict=True):
        torch.testing.assert_close(got.rebuild(), W, atol=2e-6, rtol=0)


def test_principal_and_minor_split_the_matrix() -> None:
    result = decompose(ZOO["random"].float())
    top, bottom = result.principal(30), result.minor(30)
    assert (top.g, bottom.g) == (10, 30)
    torch.testing.assert_close(top.rebuild() + bottom.rebuild(), result.rebuild(), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="r counts minor"):
        result.principal(41)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 4)])
def test_refuses_what_is_not_a_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be 2-D"):
        decompose(torch.zeros(shape))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_input_names_the_matrix_and_keeps_the_others(bad: float) -> None:
    broken = gaussian(6, 6).float()
    broken[2, 3] = bad
    with pytest.raises(DecompositionFailed, match="matrix 1: not finite") as caught:
        decompose_many([gaussian(6, 6).float(), broken, gaussian(6, 6, seed=2).float()])
    assert caught.value.failures == {1: "not finite"}
    assert [result is not None for result in caught.value.results] == [True, False, True]


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_ladder_finds_the_same_answer(
    failing: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Break the batch, then the batch and the jitter, ...; whatever rung is left gives the exact result."""
    calls = 0

    def broken(original):
        def attempt(W):
            nonlocal calls
            calls += 1
            if calls <= failing:
                raise torch.linalg.LinAlgError("did not converge")
            return original(W)

        return attempt

    monkeypatch.setattr(module, "gram_svd", broken(module.gram_svd))
    monkeypatch.setattr(module, "lapack_svd", broken(module.lapack_svd))
    W = gaussian(12, 9).float()
    with caplog.at_level(logging.WARNING):
        got = decompose(W)
    assert ["jitter", "float64 SVD", "CPU"][failing - 1] in caplog.text
    torch.testing.assert_close(got.rebuild(), W, atol=2e-6, rtol=0)
    assert got.S.dtype == torch.float32


def test_ladder_gives_up_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(W):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(module, "gram_svd", never)
    monkeypatch.setattr(module, "lapack_svd", never)
    with pytest.raises(DecompositionFailed, match=r"jitter: .*float64 SVD: .*CPU: "):
        decompose(gaussian(4, 4).float())


def test_a_silent_nan_result_goes_down_the_ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    original = module.gram_svd

    def silent(W):
        result = original(W)
        if W.dim() == 3:
            result.S[0, 0] = float("nan")
        return result

    monkeypatch.setattr(module, "gram_svd", silent)
    W = gaussian(4, 4).float()
    torch.testing.assert_close(decompose(W).rebuild(), W, atol=2e-6, rtol=0)

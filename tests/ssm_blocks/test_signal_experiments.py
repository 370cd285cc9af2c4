"""The experiments on signals, delays and images: their tasks, controls and measures."""

import io
import json
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image

from ssm_blocks.experiments import scifar
from ssm_blocks.experiments.counting import OperationCounter
from ssm_blocks.experiments.delay import work
from ssm_blocks.experiments.delta_speed import make_inputs, naive_wy, ours
from ssm_blocks.experiments.linear_attention import DENSE, POSITIONED
from ssm_blocks.experiments.runner import plan, run_job
from ssm_blocks.experiments.sinusoid import SinusoidModel, errors
from ssm_blocks.mixer import build
from ssm_blocks.ops.reference import delta_rule_reference
from ssm_blocks.tasks.cifar import SOURCE, cifar10, made_up
from ssm_blocks.tasks.delay import Delay
from ssm_blocks.tasks.oscillation import INPUTS, Oscillations, oscillation
from ssm_blocks.tasks.task import IGNORED
from tests.ssm_blocks.mixer_checks import assert_equal, everything, rand, random_state


def test_an_oscillation_solves_its_differential_equation() -> None:
    """y'' + 2 zeta w y' + w^2 y = 0, by differences of a finely sampled one; and it starts at A cos(phase)."""
    fine = 1e-3
    w, zeta, phase, amplitude = (torch.tensor([x], dtype=torch.float64) for x in (0.5 * fine, 0.1, 0.3, 1.2))
    y = oscillation(w, zeta, phase, amplitude, 4000)[0]
    assert y[0].item() == pytest.approx(1.2 * math.cos(0.3))
    second, first = (y[2:] - 2 * y[1:-1] + y[:-2]) / fine**2, (y[2:] - y[:-2]) / (2 * fine)
    assert (second + 2 * 0.1 * 0.5 * first + 0.25 * y[1:-1]).abs().max() < 1e-4


def test_the_impulse_carries_everything_or_nothing() -> None:
    x, y = Oscillations().batch(0, 3, size=64, length=32)
    assert x.shape == (64, 32, INPUTS)
    assert not x[:, 1:].any()
    torch.testing.assert_close(y[:, 0], x[:, 0, 3])  # A cos(phase)
    same, targets = Oscillations(told=False).batch(0, 3, size=64, length=32)
    assert torch.equal(targets, y)
    assert (same == same[:1]).all()
    other, _ = Oscillations().batch(0, 3, size=64, length=32, split="test")
    assert not torch.isin(other[:, 0, 1], x[:, 0, 1]).any()


def test_predicting_zero_has_the_variance_as_error() -> None:
    """Phases are uniform, so the best guess without the parameters is 0."""
    model = SinusoidModel(64, mixer="oscillatory_diagonal", width=4, state_size=4)
    torch.nn.init.zeros_(model.head.weight)
    found = errors(model, Oscillations(), 4096, 64, 0, torch.device("cpu"))
    assert found["ratio"] == pytest.approx(1, abs=0.01)
    assert found["mse"] == pytest.approx(found["variance"], rel=0.01)


def test_delay() -> None:
    tokens, targets = Delay(3).batch(0, 0, size=16, length=20)
    assert (targets[:, :3] == IGNORED).all()
    assert torch.equal(targets[:, 3:], tokens[:, :-3])
    with pytest.raises(ValueError, match="longer"):
        Delay(20).batch(0, 0, size=16, length=20)


@pytest.mark.parametrize("mixer", [DENSE, POSITIONED])
def test_the_controls_agree_in_all_forms(mixer: str) -> None:
    options = {"inner": DENSE} if mixer == POSITIONED else {}
    model = build(mixer, 8, num_heads=2, **options).double()
    x = rand(2, 70, 8)
    if mixer == DENSE:
        state = random_state(model, 2)
        assert_equal(everything(model, "parallel", x, state), everything(model, "reference", x, state), 1e-10)
        return
    whole, last = model(x, return_state=True)
    first, state = model(x[:, :30], return_state=True)
    for t in range(30, 70):
        y, state = model.step(x[:, t], state)
        torch.testing.assert_close(y, whole[:, t])
    torch.testing.assert_close(first, whole[:, :30])
    torch.testing.assert_close(state, last)
    moved, _ = model(x[:, 30:], return_state=True)
    assert (moved - whole[:, 30:]).abs().max() > 1e-3, "positions make a difference"


def test_work_is_counted_without_doing_it() -> None:
    dense, hss = (work(name, 512, 64) for name in ("dense", "hss"))
    assert hss["kernels"] > dense["kernels"] > 0
    whole = 3 * 2 * 512 * 1024**2 / 1e12  # a map of 1024 channels or a product with the state, both gradients too
    assert 6 * whole < dense["tflop"] < 6.6 * whole  # four maps, writing, reading, and chunks of 64
    assert 4 * whole < hss["tflop"] < dense["tflop"]


def test_the_naive_form_and_ours_are_the_delta_rule() -> None:
    inputs = make_inputs(1, 128, 16, 0, torch.float32, torch.device("cpu"))
    core = [inputs[name] for name in ("q", "k", "v", "beta")]
    want = delta_rule_reference(*core, None, inputs["S"])
    for form in (naive_wy, ours):
        for got, expected in zip(form(*core, None, inputs["S"]), want, strict=True):
            assert (got - expected).abs().max() < 1e-5


def test_operations_are_counted_by_kind() -> None:
    a, b = torch.randn(8, 16), torch.randn(16, 4)
    with OperationCounter() as counter:
        (a @ b).t().exp()
    assert counter.in_products == 2 * 8 * 16 * 4
    assert counter.elsewhere == 8 * 4
    assert (counter.kernels, counter.written) == (2, 2 * 8 * 4 * a.element_size())


# images ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A folder of three images, uniform in colour except for the first pixel, and a cache of its own."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    encoded = []
    for i in range(3):
        image = Image.new("RGB", (32, 32), (10 * i, 20, 200))
        image.putpixel((1, 0), (255, 255, 255))  # second of the first row
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    for split in ("train", "test"):
        parquet.write_table(pa.table({"img": encoded, "label": [7, 8, 9]}), tmp_path / f"{split}.parquet")
    monkeypatch.setenv("SVDTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(SOURCE, str(tmp_path))
    return tmp_path


def test_images_come_row_by_row_and_are_decoded_once(images) -> None:
    found = cifar10("train")
    assert found.pixels.shape == (3, 1024, 3)
    assert found.labels.tolist() == [7, 8, 9]
    assert found.pixels[2, 0].tolist() == [20, 20, 200]
    assert found.pixels[0, 1].tolist() == [255, 255, 255]
    (cached,) = (images / "cache").glob("cifar10-*.pt")
    before = cached.stat().st_mtime_ns
    assert torch.equal(cifar10("train").pixels, found.pixels)
    assert cached.stat().st_mtime_ns == before


def test_datasets_and_torchvision_give_the_same_images(images, monkeypatch) -> None:
    """Both by stand-ins with what the packages document: rows with a PIL image; `data` [N, 32, 32, 3] and `targets`."""
    import datasets

    found = cifar10("train")
    pictures = [Image.fromarray(x.view(32, 32, 3).numpy()) for x in found.pixels]
    rows = [{"img": i, "label": n} for i, n in zip(pictures, found.labels.tolist(), strict=True)]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows if name == "uoft-cs/cifar10" else [])
    package = ModuleType("torchvision.datasets")
    package.CIFAR10 = lambda root, train, download: SimpleNamespace(
        data=found.pixels.view(-1, 32, 32, 3).numpy() if train and root == "there" else None,
        targets=found.labels.tolist(),
    )
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", package)
    for source in ("datasets", "torchvision:there"):
        read = cifar10("train", source)
        assert torch.equal(read.pixels, found.pixels)
        assert torch.equal(read.labels, found.labels)


def test_missing_images_are_an_error_of_one_line(tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="no train"):
        cifar10("train", str(tmp_path))
    monkeypatch.delenv(SOURCE, raising=False)
    with pytest.raises(ValueError, match="--data"):
        cifar10("train")


def row(arm: str, tmp_path) -> dict:
    jobs, _ = plan(
        ["scifar"], seeds=1, quick=True, device="cpu", out=tmp_path, command="", parallel=1, arms={arm}
    )  # fmt: skip
    return run_job(jobs[0])


def test_budgets_are_spent_exactly(tmp_path) -> None:
    for arm in ("adaptive_16", "random_16"):
        found = row(arm, tmp_path)
        assert sum(found["ranks"]) == 16
        assert all(1 <= rank <= 8 for rank in found["ranks"])
        assert len(found["logdet"]) == 4
    assert row("fixed_4", tmp_path)["ranks"] == [4] * 4


def test_the_first_phase_is_trained_once_and_taken_over_exactly(tmp_path, monkeypatch) -> None:
    """A run that takes the kept half over ends with the same weights as one that trained it."""
    monkeypatch.setenv("SVDTRAIN_CACHE", str(tmp_path))
    settings = {**scifar.QUICK, "made_up": 0}

    def trained() -> tuple[scifar.Run, int]:
        torch.manual_seed(0)
        model = scifar.PixelModel(2, 0.0)
        optimizer = scifar.make_optimizer(model, settings["lr"], 0.0)
        run = scifar.Run(model, optimizer, made_up("train", 20), settings, 0)
        scifar.first_phase(run, 2)
        scifar.train_steps(run, settings["half_steps"], 2 * settings["half_steps"])
        return run, len(list((tmp_path / "scifar").glob("*.pt")))

    (first, files), (second, same_files) = trained(), trained()
    assert files == same_files == 1
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_rows_are_plain_json(tmp_path) -> None:
    found = row("fixed_8", tmp_path)
    assert json.loads(json.dumps(found)) == found
    assert scifar.ratio(found["logdet"]) >= 1

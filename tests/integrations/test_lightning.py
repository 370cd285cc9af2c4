"""SVDCallback in the real Lightning trainer: switches, is saved in the checkpoint, resumes."""

from pathlib import Path

import pytest
import torch
from torch import nn

from svdtrain.config import SVDConfig

lightning = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.filterwarnings("ignore")  # the library's own deprecations are not ours to fix

CONFIG = SVDConfig(
    svd_rule="original", svd_preset="fast", svd_interval=2, svd_warmup=2, svd_min_rank=4, svd_targets="weight"
)


def make_module() -> "lightning.LightningModule":
    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 24))

        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            return (self.layers(batch[0]) - batch[0].flip(-1)).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    return Module()


def fit(directory: Path, steps: int, callback, checkpoint: Path | None = None) -> tuple[nn.Module, Path]:
    data = torch.randn(24, 24, generator=torch.Generator().manual_seed(1))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=4)
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, callbacks=[callback], log_every_n_steps=2, logger=True,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        default_root_dir=directory,
    )  # fmt: skip
    module = make_module()
    trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    return module, directory


class SaveAt(lightning.Callback):
    """Saves a checkpoint after a step, while the attached method is at work."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_it_watches_switches_and_resumes_exactly(tmp_path) -> None:
    from svdtrain.integrations.lightning import SVDCallback

    path = tmp_path / "at6.ckpt"  # step 6 ends an epoch: within one, Lightning itself starts the data over

    class Both(SVDCallback):
        def on_train_batch_end(self, trainer, *args) -> None:
            super().on_train_batch_end(trainer, *args)
            SaveAt(6, path).on_train_batch_end(trainer)

    straight, _ = fit(tmp_path / "straight", 12, Both(CONFIG))
    saved = torch.load(path, weights_only=True)["callbacks"]
    (state,) = [value for key, value in saved.items() if "Both" in key]
    assert any(target["factors"] is not None for target in state["targets"].values()), "nothing switched before step 6"
    resumed, _ = fit(tmp_path / "resumed", 12, Both(CONFIG), checkpoint=path)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_checkpoint_saved_after_fit_resumes_too(tmp_path, caplog) -> None:
    from svdtrain.integrations.lightning import SVDCallback

    class Sees(SVDCallback):
        """Under the name that the checkpoint knows."""

        state_key = "SVDCallback"

        def on_train_start(self, trainer, pl_module) -> None:
            super().on_train_start(trainer, pl_module)
            self.lowrank = [target.name for target in self.svd.targets.values() if target.lowrank]

    def fit_and_save(callback, path: Path, steps: int = 6, checkpoint: Path | None = None) -> list[str]:
        callbacks = [SaveAt(5, tmp_path / "plain.ckpt")] if callback is None else [callback]
        trainer = lightning.Trainer(
            max_steps=steps, accelerator="cpu", devices=1, callbacks=callbacks, logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        data = torch.randn(24, 24, generator=torch.Generator().manual_seed(1))
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=4)
        trainer.fit(make_module(), loader, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
        trainer.save_checkpoint(path)
        return getattr(callback, "lowrank", [])

    path = tmp_path / "after.ckpt"
    assert fit_and_save(Sees(CONFIG), path) == []
    assert fit_and_save(Sees(CONFIG), tmp_path / "later.ckpt", 8, path)
    assert "starts in full mode" not in caplog.text
    fit_and_save(None, path)
    assert fit_and_save(Sees(CONFIG), tmp_path / "later.ckpt", 8, path) == []
    assert "starts in full mode" in caplog.text


def test_reregister_is_refused() -> None:
    from svdtrain.integrations.lightning import SVDCallback

    with pytest.raises(ValueError, match="leave it at auto"):
        SVDCallback(SVDConfig(svd_adapter="reregister"))


def test_several_optimizers_are_refused(tmp_path) -> None:
    from svdtrain.integrations.lightning import SVDCallback

    module = make_module()
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1)] * 2
    trainer = type("T", (), {"optimizers": optimizers})()
    with pytest.raises(ValueError, match="one optimizer"):
        SVDCallback(CONFIG).on_train_start(trainer, module)


def test_the_example_of_the_page_runs(tmp_path, monkeypatch) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "HOOKS.md"
    code = next(part for part in page.read_text().split("```python\n") if "svdtrain[lightning]" in part).split("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert names["trainer"].global_step == 8

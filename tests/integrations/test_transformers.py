"""SVDCallback in the real transformers.Trainer: switches, saves beside the checkpoint, resumes."""

import warnings
from pathlib import Path

import pytest
import torch

from svdtrain.config import SVDConfig

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # the library's own deprecations are not ours to fix

CONFIG = SVDConfig(svd_rule="original", svd_preset="fast", svd_interval=2, svd_warmup=2, svd_min_rank=4)


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(16) * (index + 1)) % 61
        return {"input_ids": ids, "labels": ids}


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=2, max_position_embeddings=16, **shape)
    return transformers.LlamaForCausalLM(config)


def train(directory: Path, steps: int, callback, resume: bool = False) -> dict[str, torch.Tensor]:
    arguments = transformers.TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=6,
        logging_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    model = make_model()
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[callback])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train(resume_from_checkpoint=resume)
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_it_watches_switches_and_resumes_exactly(tmp_path, capsys) -> None:
    from svdtrain.integrations.transformers import STATE_FILE, SVDCallback

    straight = train(tmp_path / "straight", 12, SVDCallback(CONFIG))
    assert "svd/model.layers.0.self_attn.q_proj/gradient_lift" in capsys.readouterr().out  # in the trainer's own log
    saved = torch.load(tmp_path / "straight" / "checkpoint-6" / STATE_FILE, weights_only=True)
    assert any(target["factors"] is not None for target in saved["targets"].values()), "nothing switched before step 6"

    train(tmp_path / "parts", 6, SVDCallback(CONFIG))
    resumed = train(tmp_path / "parts", 12, SVDCallback(CONFIG), resume=True)
    for name, value in straight.items():
        assert torch.equal(value, resumed[name]), name


def test_without_the_saved_state_it_says_so_and_goes_on(tmp_path, caplog) -> None:
    from svdtrain.integrations.transformers import STATE_FILE, SVDCallback

    train(tmp_path, 6, SVDCallback(CONFIG))
    (tmp_path / "checkpoint-6" / STATE_FILE).unlink()
    train(tmp_path, 8, SVDCallback(CONFIG), resume=True)
    assert "full mode" in caplog.text


def test_the_example_of_the_page_runs(tmp_path, monkeypatch) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "HOOKS.md"
    code = next(part for part in page.read_text().split("```python\n") if "svdtrain[transformers]" in part).split(
        "```"
    )[0]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert names["trainer"].state.global_step == 6

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


def make_trainer(directory: Path, steps: int, callback, **settings) -> "transformers.Trainer":
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
        **settings,
    )
    return transformers.Trainer(model=make_model(), args=arguments, train_dataset=Rows(), callbacks=[callback])


def train(directory: Path, steps: int, callback, resume: bool | str = False, **settings) -> dict[str, torch.Tensor]:
    trainer = make_trainer(directory, steps, callback, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train(resume_from_checkpoint=resume)
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


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


def test_a_checkpoint_of_another_folder_is_found_where_the_arguments_name_it(tmp_path, caplog) -> None:
    from svdtrain.integrations.transformers import SVDCallback

    train(tmp_path / "first", 6, SVDCallback(CONFIG))
    checkpoint = str(tmp_path / "first" / "checkpoint-6")
    straight = train(tmp_path / "first", 8, SVDCallback(CONFIG), resume=checkpoint)
    moved = train(tmp_path / "other", 8, SVDCallback(CONFIG), resume=checkpoint, resume_from_checkpoint=checkpoint)
    assert "full mode" not in caplog.text
    assert all(torch.equal(value, moved[name]) for name, value in straight.items())


def test_an_interrupted_train_can_be_called_again(tmp_path) -> None:
    """As in a notebook: the trainer keeps its optimizer, to which the method was still attached."""
    from svdtrain.integrations.transformers import SVDCallback

    class Interrupts(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            raise KeyboardInterrupt

    trainer = make_trainer(tmp_path, 6, SVDCallback(CONFIG))
    trainer.add_callback(interrupts := Interrupts())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(interrupts)
    trainer.train()
    assert trainer.state.global_step == 6


def test_reregister_is_refused() -> None:
    from svdtrain.integrations.transformers import SVDCallback

    with pytest.raises(ValueError, match="leave it at auto"):
        SVDCallback(SVDConfig(svd_adapter="reregister"))


def test_a_trial_of_a_search_is_not_stopped_by_its_folder(tmp_path, caplog) -> None:
    from svdtrain.integrations.transformers import SVDCallback

    trainer = make_trainer(tmp_path, 6, SVDCallback(CONFIG))
    trainer._get_output_dir = lambda trial: str(tmp_path / "run-0")
    trainer.train()
    assert "gets no svdtrain.pt" in caplog.text


def test_the_example_of_the_page_runs(tmp_path, monkeypatch) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "HOOKS.md"
    code = next(part for part in page.read_text().split("```python\n") if "svdtrain[transformers]" in part).split(
        "```"
    )[0]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert names["trainer"].state.global_step == 6

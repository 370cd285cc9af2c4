"""Samples of text from the model in training."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from svdtrain.model import GPT, generate
from svdtrain.trainer.hooks import Hook, Priority
from svdtrain.trainer.state import TrainState


class SampleText(Hook):
    """Continues each prompt every `every` steps (0: never) and when training ends; publishes `sample` records.

    Uses a random generator of its own, so that sampling does not change training.
    """

    name = "sample_text"
    priority = Priority.OBSERVE

    def __init__(
        self, prompts: Sequence[str], *, every: int = 0, num_tokens: int = 64, temperature: float = 0.8, top_k: int = 50
    ) -> None:
        self.prompts = list(prompts)
        self.every = every
        self.num_tokens = num_tokens
        self.temperature = temperature
        self.top_k = top_k

    def on_step_end(self, state: TrainState) -> None:
        if self.every and state.step % self.every == 0 and state.step < state.num_iterations:
            self._sample(state)

    def on_stop(self, state: TrainState) -> None:
        # After a signal the seconds are counted; behind a vetoed step the weights may be broken.
        if not (state.control.ending or state.control.skip_step):
            self._sample(state)

    def _sample(self, state: TrainState) -> None:
        if not state.world.is_main:
            return
        state.model.eval()
        for prompt in self.prompts:
            state.log("sample", {"prompt": prompt, "text": self._continue(state, prompt)})
        state.model.train()

    @torch.no_grad()
    def _continue(self, state: TrainState, prompt: str) -> str:
        ids = [state.tokenizer.bos_id, *state.tokenizer.encode(prompt)]
        assert isinstance(state.model, GPT), "samples need our own GPT"
        new = []
        for token in generate(
            state.model,
            ids,
            self.num_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            seed=state.config.train.seed,
        ):
            if token == state.tokenizer.bos_id:  # the document ends here
                break
            new.append(token)
        return state.tokenizer.decode(new)

"""Names, custom mixers, what importing costs."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import ssm_blocks
from ssm_blocks import Mixer, State, available, build, non_matrix_parameters, register
from ssm_blocks.layers.modules import Linear
from ssm_blocks.mixer import _BUILT_IN, _registry, mixer_class


class Average(Mixer):
    """The running mean: a smallest complete mixer, as docs/SSM.md shows it."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.v_proj = Linear(dim, dim)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        self.v_proj.init_weights(generator)

    def init_state(self, batch, device=None, dtype=None) -> State:
        return {"sum": torch.zeros(batch, self.dim + 1, device=device)}

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = self(x.unsqueeze(1), state, return_state=True)
        return y.squeeze(1), state

    def forward(self, x, state=None, cu_seqlens=None, return_state=False):
        if cu_seqlens is not None:
            raise ValueError("Average takes no packed sequences")
        state = self.init_state(x.size(0), x.device) if state is None else state
        counted = torch.cat([self.v_proj(x), torch.ones_like(x[..., :1])], -1).float()
        total = state["sum"].unsqueeze(1) + counted.cumsum(1)
        y = (total[..., :-1] / total[..., -1:]).to(x.dtype)
        return (y, {"sum": total[:, -1]}) if return_state else y


@pytest.fixture
def _clean_registry():
    before = dict(_registry)
    yield
    _registry.clear()
    _registry.update(before)


def test_every_listed_name_builds_its_own_class() -> None:
    assert available() == sorted(_BUILT_IN)
    classes = {name: mixer_class(name) for name in available()}
    assert len(set(classes.values())) == len(classes)
    assert all(issubclass(cls, Mixer) for cls in classes.values())


def test_unknown_name_lists_the_names() -> None:
    with pytest.raises(ValueError, match=r"unknown mixer 'mamba'; available: .*deltanet.*monarch"):
        build("mamba", 8)


@pytest.mark.usefixtures("_clean_registry")
def test_a_custom_mixer_by_name() -> None:
    register("average")(Average)
    assert "average" in available()
    mixer = build("average", 4)
    x = torch.randn(2, 6, 4)
    state = mixer.init_state(2)
    for t in range(6):
        y, state = mixer.step(x[:, t], state)
    torch.testing.assert_close(y, mixer(x)[:, -1])
    register("average")(Average)  # the same class again: a module that was imported twice
    with pytest.raises(ValueError, match="taken"):
        register("average")(type("Other", (Mixer,), {}))
    with pytest.raises(ValueError, match="taken"):
        register("deltanet")(Average)
    with pytest.raises(ValueError, match="subclasses"):
        register("linear")(nn.Linear)  # type: ignore[type-var]


def test_a_custom_mixer_by_where_it_lies(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_mixers.py").write_text("from ssm_blocks import Mixer\nclass Own(Mixer): pass\nnumber = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert type(build("my_mixers:Own", 4)).__name__ == "Own"
    for wrong, words in (
        ("my_mixers:Other", "Other"),
        ("no_such_file:Own", "no_such"),
        ("my_mixers:number", "subclass"),
    ):
        with pytest.raises(ValueError, match=words):
            build(wrong, 4)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'deltanet'.*'heads'.*num_heads"):
        build("deltanet", 8, heads=2)
    with pytest.raises(ValueError, match="head"):
        build("ssd_deltanet", 8, head=2)


def test_gates_poles_and_taps_are_no_matrices() -> None:
    found = non_matrix_parameters(build("gated_ssd_deltanet", 8))
    expected = {"conv.weight", "norm.weight", "beta_gate.weight", "beta_gate.bias", "decay_gate.weight"}
    assert expected <= set(found)
    assert found["conv.weight"].ndim == 2  # although it is two-dimensional
    assert "q_proj.weight" not in found


def test_a_mixer_needs_a_width() -> None:
    with pytest.raises(ValueError, match="width"):
        build("deltanet", 0)


def test_import_is_light() -> None:
    """No layer, no fla, and under .2 s on top of torch (as the interpreter counts it)."""
    code = (
        "import torch, time, sys; start = time.process_time(); import ssm_blocks; "
        "print(time.process_time() - start); "
        "assert not [m for m in sys.modules if m.startswith(('ssm_blocks.layers', 'ssm_blocks.ops', 'fla'))]"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 0.2
    assert ssm_blocks.available()


def test_fla_is_imported_only_where_it_runs(tmp_path) -> None:
    """Every mixer, forward, backward and step on a CPU, with an fla on the path that breaks whoever imports it."""
    (tmp_path / "fla.py").write_text("raise SystemError('imported')")
    code = (
        f"import sys, torch; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from ssm_blocks import available, build\n"
        "for name in available():\n"
        "    mixer = build(name, 16)\n"
        "    mixer(torch.randn(1, 5, 16)).sum().backward()\n"
        "    mixer.step(torch.randn(1, 16), mixer.init_state(1))\n"
        "assert 'fla' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

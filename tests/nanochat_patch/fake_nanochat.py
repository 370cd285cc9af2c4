"""The touched surface of nanochat and nothing else, in both forms: enough of a checkout to run the launcher on.

Written for these tests; it trains a regression, with an optimizer that keeps one stacked state a shape (2026) or that
writes its update into p.grad (2025), as the real ones do.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

GPT = """
from types import SimpleNamespace
import torch
from torch import nn

class Attention(nn.Module):
    def __init__(self, width, layer):
        super().__init__()
        self.layer = layer
        for name in ("c_q", "c_k", "c_v", "c_proj"):
            setattr(self, name, nn.Linear(width, width, bias=False))

    def mix(self, x):
        return self.c_proj(torch.tanh(self.c_q(x)) * torch.tanh(self.c_k(x)) + self.c_v(x))

class Block(nn.Module):
    def __init__(self, width, layer):
        super().__init__()
        self.attn = Attention(width, layer)

    def forward(self, x, *others):
        return x + self.attn(x, *others)

class Float8Linear(nn.Linear):
    pass

class GPT(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.config = SimpleNamespace(n_embd=width, n_layer=2, sequence_len=8)
        blocks = nn.ModuleList([Block(width, 0), Block(width, 1)])
        self.transformer = nn.ModuleDict({"h": blocks, "wte": nn.Linear(width, width, bias=False)})
        self.add_parts(width)

    @torch.no_grad()
    def init_weights(self):
        for parameter in self.parameters():
            parameter.normal_(std=parameter.size(-1) ** -0.5)

    def forward(self, x, kv_cache=None):
        x = self.transformer["wte"](x)
        for layer, block in enumerate(self.transformer["h"]):
            x = block(x, *self.others(layer, x), kv_cache)
        return x

    def matrices(self):
        return list(self.transformer["h"].parameters())

    def estimate_flops(self):
        return 6 * self.num_counted() + 2 * 12 * self.config.n_embd * self.config.sequence_len
"""

ONE_OPTIMIZER = """
class Linear(nn.Linear):
    pass

class Stacked(torch.optim.Optimizer):
    def __init__(self, groups):
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            getattr(self, group["kind"])(group)

    def adamw(self, group):
        for p in group["params"]:
            m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
            m.lerp_(p.grad, 1 - group["betas"][0])
            p.sub_(m.sign(), alpha=group["lr"])

    def muon(self, group):
        params = group["params"]
        state = self.state[params[0]]
        grads = torch.stack([p.grad for p in params])
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grads)
        state["momentum_buffer"].lerp_(grads, 1 - group["momentum"])
        for p, m in zip(params, state["momentum_buffer"]):
            p.sub_(m, alpha=group["lr"])

def add_parts(self, width):
    self.value_embeds = nn.ModuleDict({"1": Linear(width, width, bias=False)})
    self.window_sizes = [(4, 0), (8, 0)]

def others(self, layer, x):
    return self.value_embeds[str(layer)](x) if str(layer) in self.value_embeds else None, None, (-1, 0)

def attend(self, x, ve, cos_sin, window_size, kv_cache):
    if kv_cache is not None and self.layer == 1:
        kv_cache.advance(x.size(1))
    return self.mix(x) if ve is None else self.mix(x) + ve

def num_matmul_params(self):
    return sum(m.weight.numel() for m in self.modules() if isinstance(m, Linear))

def setup_optimizer(self, matrix_lr=0.3, scalar_lr=0.3):
    adamw = dict(kind="adamw", lr=1e-3, betas=(0.9, 0.99), eps=1e-10, weight_decay=0.1)
    values = list(self.value_embeds.parameters())
    assert len(list(self.parameters())) == len(values) + len(self.matrices()) + 1  # wte stays as it is
    optimizer = Stacked([
        {**adamw, "params": values},
        dict(kind="muon", params=self.matrices(), lr=matrix_lr, momentum=0.8),
    ])
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer

Attention.forward = attend
GPT.setup_optimizer = setup_optimizer
GPT.add_parts, GPT.others = add_parts, others
GPT.num_matmul_params, GPT.num_counted = num_matmul_params, lambda self: self.num_matmul_params()
"""

TWO_OPTIMIZERS = """
class Overwriting(torch.optim.Optimizer):
    def __init__(self, params, **defaults):
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                p.grad.copy_(buffer)
                p.sub_(p.grad.mul_(group["lr"]))

def attend(self, x, cos_sin, kv_cache):
    if kv_cache is not None:
        kv_cache.insert_kv(self.layer, x, x)
    return self.mix(x)

def setup_optimizers(self, matrix_lr=0.3):
    adamw = torch.optim.AdamW(self.transformer["wte"].parameters(), lr=1e-3, betas=(0.8, 0.95), weight_decay=0.1)
    assert all(p.ndim == 2 for p in self.matrices())
    return [adamw, Overwriting(self.matrices(), lr=matrix_lr, momentum=0.8, ns_steps=5)]

Attention.forward = attend
GPT.setup_optimizers = setup_optimizers
GPT.add_parts, GPT.others = lambda self, width: None, lambda self, layer, x: (None,)
GPT.num_counted = lambda self: sum(p.numel() for p in self.parameters())
"""

CACHE = """
class KVCache:
    def __init__(self, batch_size, num_heads, seq_len, head_dim, num_layers):
        self.seqlens, self.num_layers = [0] * batch_size, num_layers

    def reset(self):
        self.seqlens = [0] * len(self.seqlens)

    def get_pos(self):
        return self.seqlens[0]

    def advance(self, num_tokens):
        self.seqlens = [length + num_tokens for length in self.seqlens]

    def prefill(self, other):
        assert self.get_pos() == 0
        self.advance(other.get_pos())
"""

LAZY_CACHE = """
class KVCache:
    def __init__(self, batch_size, num_heads, seq_len, head_dim, num_layers):
        self.pos, self.kv_cache, self.num_layers = 0, None, num_layers

    def reset(self):
        self.pos = 0

    def get_pos(self):
        return self.pos

    def insert_kv(self, layer, k, v):
        self.kv_cache = "keys"
        if layer == self.num_layers - 1:
            self.pos += k.size(1)

    def prefill(self, other):
        assert self.kv_cache is None
        assert other.kv_cache is not None
        self.kv_cache, self.pos = other.kv_cache, other.pos
"""

COMMON = """
class DummyWandb:
    def log(self, *args, **kwargs):
        pass

    def finish(self):
        pass
"""

CHECKPOINTS = """
import json, os
import torch

def save_checkpoint(checkpoint_dir, step, model_data, optimizer_data, meta_data, rank=0):
    os.makedirs(checkpoint_dir, exist_ok=True)
    torch.save(model_data, f"{checkpoint_dir}/model_{step:06d}.pt")
    torch.save(optimizer_data, f"{checkpoint_dir}/optim_{step:06d}.pt")

def load_checkpoint(checkpoint_dir, step, device, load_optimizer=False, rank=0):
    read = lambda name: torch.load(f"{checkpoint_dir}/{name}_{step:06d}.pt", map_location=device)
    return read("model"), read("optim") if load_optimizer else None, {"step": step}
"""

WANDB = """
class Run:
    def __init__(self):
        self.logged, self.name = [], "real"

    def log(self, data):
        self.logged.append(data)

    def finish(self):
        self.logged.append("finished")

last = None

def init(**kwargs):
    global last
    last = Run()
    return last
"""

BASE_TRAIN = """
import json, os, sys
import torch, wandb
from nanochat.gpt import GPT, Float8Linear
from nanochat.common import DummyWandb
from nanochat.checkpoint_manager import save_checkpoint, load_checkpoint

settings = {"out": "out", "num_iterations": 6, "save_every": -1, "resume_from_step": -1, "run": "dummy", "fp8": 0}
for argument in sys.argv[1:]:
    key, value = argument[2:].split("=")
    assert key in settings, key
    settings[key] = type(settings[key])(value)
user_config = dict(settings)
num_iterations, total_batch_size, ddp_world_size, device = settings["num_iterations"], 32, 1, "cpu"
model_config_kwargs = {"n_layer": 2}
wandb_run = DummyWandb() if settings["run"] == "dummy" else wandb.init(project="fake")
torch.manual_seed(42)
model = GPT()
model.init_weights()
if settings["fp8"]:
    model.transformer["h"][0].attn.c_q = Float8Linear(24, 24, bias=False)
resuming = settings["resume_from_step"] != -1
if resuming:
    start = settings["resume_from_step"]
    model_data, optimizer_data, meta = load_checkpoint(settings["out"], start, "cpu", load_optimizer=True)
    model.load_state_dict(model_data, strict=True, assign=True)
result = getattr(model, "setup_optimizer", None) or model.setup_optimizers
result = result()
optimizers = result if isinstance(result, list) else [result]
if resuming:
    for optimizer, state in zip(optimizers, optimizer_data):
        optimizer.load_state_dict(state)
step = settings["resume_from_step"] if resuming else 0
losses = []
debiased_smooth_loss, lrm, dt, tok_per_sec = 0.0, 1.0, 0.25, 128
target = torch.randn(24, 24, generator=torch.Generator().manual_seed(0))
while True:
    last_step = step == num_iterations
    if last_step or step == 0:
        wandb_run.log({"step": step, "val/bpb": 2.5, "total_training_time": 0})
    if last_step:
        wandb_run.log({"step": step, "core_metric": 0.125, "centered_results": {"said": 0.25}})
    due = settings["save_every"] > 0 and step > 0 and step % settings["save_every"] == 0
    if last_step or (due and step != settings["resume_from_step"]):
        save_checkpoint(settings["out"], step, model.state_dict(), [o.state_dict() for o in optimizers], {"step": step})
    if last_step:
        break
    x = torch.randn(4, 8, 24, generator=torch.Generator().manual_seed(step))
    loss = (model(x) - x @ target).square().mean()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    losses.append(loss.item())
    debiased_smooth_loss = losses[-1]
    step += 1
    if os.environ.get("FAKE_CRASH") == str(step):
        raise RuntimeError("the device fell off")
with open(f"{settings['out']}/losses.json", "w") as file:
    json.dump(losses, file)
wandb_run.finish()
"""


def write_checkout(path: Path, form: str) -> Path:
    """A fake checkout; form is "2026" (one optimizer) or "2025" (two)."""
    files = {
        "nanochat/__init__.py": "",
        "nanochat/gpt.py": GPT + (ONE_OPTIMIZER if form == "2026" else TWO_OPTIMIZERS),
        "nanochat/common.py": COMMON,
        "nanochat/engine.py": CACHE if form == "2026" else LAZY_CACHE,
        "nanochat/checkpoint_manager.py": CHECKPOINTS,
        "scripts/base_train.py": BASE_TRAIN,
        "wandb.py": WANDB,
    }
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


@contextmanager
def undone() -> Iterator[None]:
    """Take back what a launch does to this process: directory, path, arguments, imports."""
    here, path, argv, modules = os.getcwd(), list(sys.path), list(sys.argv), dict(sys.modules)
    ours = ("nanochat", "scripts", "wandb")
    for name in [name for name in sys.modules if name.split(".")[0] in ours]:
        del sys.modules[name]
    writes = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        os.chdir(here)
        sys.path[:], sys.argv[:], sys.dont_write_bytecode = path, argv, writes
        for name in [name for name in sys.modules if name.split(".")[0] in ours]:
            del sys.modules[name]
        sys.modules.update({name: module for name, module in modules.items() if name.split(".")[0] in ours})


def losses(out: Path) -> list[float]:
    return json.loads((out / "losses.json").read_text())


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    return torch.load(out / f"model_{step:06d}.pt", weights_only=True)

"""Pretrain the tinyworld's base models: an autoencoder, then text encoders and denoiser together.

    python -m rlg.tinyworld.pretrain --family sd3 --output runs/tiny-sd3

Stage 1 trains the autoencoder with L1 + L2 + a small KL on freshly drawn scenes. Stage 2 caches the latents of a fixed
set of scenes and trains the denoiser with the family's own objective, `E |out - target|^2` with (x_t, target) from
`process.noise`, on captions of the train split, 10% of them dropped for classifier-free guidance. Matrices of the
transformer are updated by Muon, the rest by AdamW; the weights that are saved are an exponential moving average.
Both stages checkpoint every few minutes and go on from there when the command is given again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from rlg import process
from rlg.backbones import backbone_of
from rlg.cli import Parser, fail_cleanly
from rlg.state import load_optimizer, save_optimizer
from rlg.tinyworld import models, scenes

_CHECKPOINT_SECONDS = 180.0


@dataclass(frozen=True)
class Budget:
    """How long to train, and on how much."""

    vae_steps: int
    vae_batch: int
    steps: int
    batch: int
    scenes: int  # size of the cached set
    lr: float
    warmup: int = 200
    dropout: float = 0.1  # share of captions replaced by "", for classifier-free guidance


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, constant, and a linear decay to zero over the last 40% of the steps."""
    return peak * min((step + 1) / warmup, 1.0, (steps - step) / (0.4 * steps))


def split_parameters(modules: Iterable[nn.Module]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices of a pure transformer's blocks, everything else): the first are for Muon, the second for AdamW."""
    matrices, rest = [], []
    for module in modules:
        for name, parameter in module.named_parameters():
            hidden = parameter.ndim == 2 and name.startswith("transformer_blocks")
            (matrices if hidden else rest).append(parameter)
    return matrices, rest


def vae_loss(vae: AutoencoderKL, images_B3HW: Tensor, generator: torch.Generator) -> Tensor:
    """L1 + 4 L2 + 1e-3 KL (the KL is a mean over latent dimensions), images in [0, 1]."""
    pixels = images_B3HW * 2 - 1
    posterior = vae.encode(pixels).latent_dist
    eps = torch.randn(posterior.mean.shape, generator=generator).to(pixels.device)
    decoded = vae.decode(posterior.mean + posterior.std * eps).sample
    error = (decoded - pixels).float()
    kl = -0.5 * (1 + posterior.logvar - posterior.mean**2 - posterior.var).float().mean()
    return error.abs().mean() + 4 * error.square().mean() + 1e-3 * kl


class Stage:
    """One resumable training loop: parameters, optimizers, EMA and a step counter, saved to a folder."""

    def __init__(self, folder: Path, module: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int):
        self.folder, self.module, self.optimizers, self.steps = folder, module, optimizers, steps
        self.ema = EMAModel(module.parameters(), decay=0.9995, use_ema_warmup=True, power=0.75)
        self.step = 0
        if (folder / "stage.json").exists():
            self._load()
        self._saved = time.monotonic()

    def _load(self) -> None:
        state = json.loads((self.folder / "stage.json").read_text())
        self.step = state["step"]
        tensors = load_file(self.folder / f"weights-{self.step}.safetensors")
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                parameter.copy_(tensors[name])
            for shadow, (name, _) in zip(self.ema.shadow_params, self.module.named_parameters(), strict=True):
                shadow.copy_(tensors[f"ema.{name}"])
        self.ema.optimization_step = self.step
        for rank, optimizer in enumerate(self.optimizers):
            load_optimizer(optimizer, self.folder / f"optimizer{rank}-{self.step}.safetensors")

    def save(self) -> None:
        """Write a checkpoint; the step named in stage.json is always a whole one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        named = list(self.module.named_parameters())
        tensors = {name: p.detach().contiguous().clone() for name, p in named}
        tensors |= {f"ema.{name}": s.contiguous() for s, (name, _) in zip(self.ema.shadow_params, named, strict=True)}
        save_file(tensors, self.folder / f"weights-{self.step}.safetensors")
        for rank, optimizer in enumerate(self.optimizers):
            save_optimizer(optimizer, self.folder / f"optimizer{rank}-{self.step}.safetensors")
        temporary = self.folder / "stage.json.tmp"
        temporary.write_text(json.dumps({"step": self.step}))
        os.replace(temporary, self.folder / "stage.json")
        for old in self.folder.glob("*.safetensors"):
            if not old.stem.endswith(f"-{self.step}"):
                old.unlink()
        self._saved = time.monotonic()

    def update(self, loss: Tensor, rates: list[float]) -> None:
        """One optimizer step; checkpoints when it is time."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        for optimizer, rate in zip(self.optimizers, rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.ema.step(self.module.parameters())
        self.step += 1
        if time.monotonic() - self._saved > _CHECKPOINT_SECONDS or self.step == self.steps:
            self.save()

    def finish(self) -> None:
        """Put the moving average into the module."""
        self.ema.copy_to(self.module.parameters())


def _autocast(device: str, bf16: bool) -> torch.autocast:
    return torch.autocast(device, dtype=torch.bfloat16, enabled=bf16)


def train_vae(vae: AutoencoderKL, folder: Path, budget: Budget, seed: int, device: str, bf16: bool) -> None:
    """Stage 1, in place."""
    stage = Stage(folder, vae, [torch.optim.AdamW(vae.parameters(), weight_decay=1e-4)], budget.vae_steps)
    bar = tqdm(total=stage.steps, initial=stage.step, desc="autoencoder", mininterval=2)
    while stage.step < stage.steps:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + stage.step)
        images = scenes.draw(scenes.training_prompts(budget.vae_batch, generator), generator).to(device)
        with _autocast(device, bf16):
            loss = vae_loss(vae, images, generator)
        stage.update(loss, [learning_rate(stage.step, stage.steps, 2e-3, 100)])
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    bar.close()
    stage.finish()


def cached_latents(
    pipe: DiffusionPipeline, file: Path, budget: Budget, seed: int, device: str, bf16: bool
) -> tuple[Tensor, list[str]]:
    """Normalised latents (scenes, C, H, W) and their captions; sets the autoencoder's scale and shift."""
    if not file.exists():
        latents, captions = encode_scenes(pipe, budget, seed, device, bf16)
        shift = latents.mean().item() if pipe.vae.config.shift_factor is not None else 0.0
        scale = 1 / (latents - shift).std().item()
        header = {"captions": json.dumps(captions), "scale": repr(scale), "shift": repr(shift)}
        temporary = file.with_suffix(".tmp")
        save_file({"latents": ((latents - shift) * scale).contiguous()}, temporary, metadata=header)
        temporary.replace(file)
    with safe_open(file, framework="pt") as opened:
        header, latents = opened.metadata(), opened.get_tensor("latents")
    pipe.vae.register_to_config(scaling_factor=float(header["scale"]))
    if pipe.vae.config.shift_factor is not None:
        pipe.vae.register_to_config(shift_factor=float(header["shift"]))
    return latents, json.loads(header["captions"])


@torch.no_grad()
def encode_scenes(
    pipe: DiffusionPipeline, budget: Budget, seed: int, device: str, bf16: bool
) -> tuple[Tensor, list[str]]:
    """Latents of freshly drawn scenes, as the autoencoder puts them out, and their captions."""
    generator = torch.Generator().manual_seed(seed)
    prompts = scenes.training_prompts(budget.scenes, generator)
    chunks = []
    for start in tqdm(range(0, len(prompts), 128), desc="latents", mininterval=2):
        images = scenes.draw(prompts[start : start + 128], generator).to(device)
        with _autocast(device, bf16):
            chunks.append(pipe.vae.encode(images * 2 - 1).latent_dist.mode().float().cpu())
    return torch.cat(chunks), [p.text for p in prompts]


def train_denoiser(
    pipe: DiffusionPipeline,
    data: tuple[Tensor, list[str]],
    folder: Path,
    budget: Budget,
    seed: int,
    device: str,
    bf16: bool,
) -> None:
    """Stage 2, in place."""
    backbone = backbone_of(pipe)
    backbone.prepare(pipe)
    denoiser = backbone.denoiser(pipe)
    trained = nn.ModuleDict({"denoiser": denoiser} | {n: getattr(pipe, n) for n in backbone.text_encoders})
    matrices, rest = split_parameters(trained.values())
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, weight_decay=1e-4, betas=(0.9, 0.95))]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, weight_decay=1e-3, ns_steps=4, adjust_lr_fn="match_rms_adamw"))
    stage = Stage(folder, trained, optimizers, budget.steps)
    forward = process.process_from_config(process.config_of(pipe.scheduler))
    latents, captions = data
    bar = tqdm(total=stage.steps, initial=stage.step, desc="denoiser", mininterval=5)
    average = None
    while stage.step < stage.steps:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + stage.step)
        pick = torch.randint(len(captions), (budget.batch,), generator=generator)
        dropped = (torch.rand(budget.batch, generator=generator) < budget.dropout).tolist()
        texts = ["" if drop else captions[i] for i, drop in zip(pick.tolist(), dropped, strict=True)]
        x0, eps = latents[pick], torch.randn(latents[pick].shape, generator=generator)
        rows = process.sample_t(forward, budget.batch, generator)
        x_t, target = process.noise(forward, rows, x0, eps)
        with _autocast(device, bf16):
            out = backbone.forward(
                denoiser, x_t.to(device), forward.time[rows].to(device), backbone.encode(pipe, texts)
            )
        loss = (out.float() - target.to(device)).square().mean()
        rate = learning_rate(stage.step, stage.steps, budget.lr, budget.warmup)
        stage.update(loss, [rate, 2 * rate][: len(optimizers)])
        average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
        bar.update()
        bar.set_postfix(loss=f"{average:.4f}")
    bar.close()
    stage.finish()


DEFAULTS = {
    "sd3": Budget(vae_steps=1200, vae_batch=32, steps=8000, batch=64, scenes=60_000, lr=1e-3),
    "sd": Budget(vae_steps=1200, vae_batch=32, steps=2600, batch=64, scenes=60_000, lr=1e-3),
}


def main() -> None:
    """Command line."""
    parser = Parser(prog="python -m rlg.tinyworld.pretrain", description=__doc__.split("\n")[0])
    parser.add_argument("--family", choices=sorted(DEFAULTS), required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder of the pipeline; state is kept beside it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no_bf16", dest="bf16", action="store_false", help="train in float32")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    for name, kind in (("vae_steps", int), ("steps", int), ("batch", int), ("scenes", int), ("lr", float)):
        parser.add_argument(f"--{name}", type=kind, help=f"default: {_default_text(name)}")
    args = parser.parse_args()
    with fail_cleanly():
        run(args)


def _default_text(name: str) -> str:
    return ", ".join(f"{family} {getattr(budget, name)}" for family, budget in DEFAULTS.items())


def run(args: argparse.Namespace) -> None:
    """Train what the arguments ask for and save the pipeline in half precision."""
    chosen = {k: v for k, v in vars(args).items() if k in Budget.__dataclass_fields__ and v is not None}
    budget = Budget(**(asdict(DEFAULTS[args.family]) | chosen))
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    pipe = models.build(args.family)
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.to(args.device).requires_grad_(True).train()
    state = args.output.with_name(args.output.name + "-state")
    train_vae(pipe.vae, state / "vae", budget, args.seed, args.device, args.bf16)
    pipe.vae.requires_grad_(False).eval()
    data = cached_latents(pipe, state / "latents.safetensors", budget, args.seed, args.device, args.bf16)
    components = dict(pipe.components)
    train_denoiser(pipe, data, state / "denoiser", budget, args.seed, args.device, args.bf16)
    taken_off = {name: part for name, part in components.items() if part is not pipe.components[name]}
    pipe.register_modules(**taken_off)  # the stand-in for T5, which the folder needs and our passes don't
    models.save(pipe, args.output)
    print(f"saved {args.output}")


if __name__ == "__main__":
    main()

"""Settings of the tinyworld's tools: of the pretraining, and of preference pairs. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from rlg.choices import DTYPES, WORLD_MODELS
from rlg.config_parser import Command


@dataclass(frozen=True)
class Budget:
    """How long to train, and on how much."""

    vae_steps: int
    vae_batch: int
    steps: int
    batch: int
    scenes: int  # size of the cached set
    lr: float
    decoder_steps: int = 0  # of the decoder alone, once the latents are fixed
    muon: bool = False  # for the matrices of a transformer; torch's is slow on CPUs without bfloat16
    warmup: int = 200
    decay: float = 0.4  # share of the denoiser's steps over which the learning rate falls to zero
    dropout: float = 0.1  # share of captions replaced by "", for classifier-free guidance


DEFAULTS = {
    ("shapes", "sd3"): Budget(vae_steps=1200, vae_batch=32, steps=8000, batch=64, scenes=60_000, lr=1e-3, muon=True),
    ("shapes", "sd"): Budget(vae_steps=1200, vae_batch=32, steps=2600, batch=64, scenes=60_000, lr=1e-3),
    ("emoji", "sd3"): Budget(
        vae_steps=1200, vae_batch=16, steps=10_000, batch=48, scenes=60_000, lr=1e-3, decay=0.6, decoder_steps=800
    ),
    ("emoji", "sd"): Budget(
        vae_steps=1200, vae_batch=16, steps=4000, batch=48, scenes=60_000, lr=1e-3, decay=0.6, decoder_steps=800
    ),
}
_WORLDS, _FAMILIES = (tuple(dict.fromkeys(key[i] for key in DEFAULTS)) for i in range(2))
_STATE = (
    "folder of what a training goes on from (default: OUTPUT-state); where two families of a world have one "
    "autoencoder, they can share it"
)
_BASE = f"{', '.join(WORLD_MODELS)}, or a folder that the pretraining wrote"


def _told(text: str) -> dict[str, str]:
    return {"help": text}


def _default_of(name: str) -> dict[str, str]:
    values = {" ".join(key): getattr(budget, name) for key, budget in DEFAULTS.items()}
    if len(set(values.values())) == 1:
        return _told(f"default: {next(iter(values.values()))}")
    return _told("default: " + ", ".join(f"{value} ({key})" for key, value in values.items()))


@dataclass(frozen=True, kw_only=True)
class PretrainingSettings:
    """Options of `python -m rlg.pretraining`. Raises ValueError for what makes no sense."""

    family: str = field(metadata=_told(" or ".join(_FAMILIES)))
    world: str = field(default="shapes", metadata=_told(" or ".join(_WORLDS)))
    output: Path = field(metadata=_told("folder of the pipeline"))
    state: Path | None = field(default=None, metadata=_told(_STATE))
    vae_steps: int | None = field(default=None, metadata=_default_of("vae_steps"))
    decoder_steps: int | None = field(default=None, metadata=_default_of("decoder_steps"))
    max_steps: int | None = field(default=None, metadata=_default_of("steps"))
    batch_size: int | None = field(default=None, metadata=_default_of("batch"))
    scenes: int | None = field(default=None, metadata=_default_of("scenes"))
    lr: float | None = field(default=None, metadata=_default_of("lr"))
    look_every: int = field(default=500, metadata=_told("steps between samples, which the state's folder keeps"))
    seed: int = field(default=0, metadata=_told("of weights, scenes and noise"))
    device: str | None = field(default=None, metadata=_told("default: cuda if there is one, else cpu"))
    dtype: str = field(default="float32", metadata=_told("float32, or bfloat16 by autocast"))
    threads: int | None = field(default=None, metadata=_told("CPU threads (default: all)"))

    def __post_init__(self) -> None:
        for name, known in (("world", _WORLDS), ("family", _FAMILIES), ("dtype", ("float32", "bfloat16"))):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
        if self.decoder_steps is not None and self.decoder_steps < 0:
            raise ValueError(f"decoder_steps must not be negative, got {self.decoder_steps}")
        for name in ("vae_steps", "max_steps", "batch_size", "scenes", "lr", "look_every", "threads"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")

    def budget(self) -> Budget:
        """The world's and the family's defaults, with what is told."""
        told = {"vae_steps": self.vae_steps, "decoder_steps": self.decoder_steps, "steps": self.max_steps}
        told |= {"batch": self.batch_size, "scenes": self.scenes, "lr": self.lr}
        return replace(DEFAULTS[self.world, self.family], **{k: v for k, v in told.items() if v is not None})

    def state_folder(self) -> Path:
        """Where the training's state is."""
        return self.state or self.output.with_name(self.output.name + "-state")


@dataclass(frozen=True, kw_only=True)
class ShowSettings:
    """Options of `python -m rlg.pretraining.show`. Raises ValueError for what makes no sense."""

    base: str = field(default="tiny-sd3", metadata=_told(_BASE))
    cfg: float = field(default=1.0, metadata=_told("classifier-free guidance scale; 1 is off"))
    steps: int = field(default=20, metadata=_told("ODE steps"))
    k: int = field(default=4, metadata=_told("images a prompt"))
    seed: int = field(default=0, metadata=_told("of the noise"))
    batch_size: int = field(default=96, metadata=_told("images a batch"))
    device: str | None = field(default=None, metadata=_told("default: cuda if there is one, else cpu"))
    dtype: str = field(default="float32", metadata=_told(", ".join(DTYPES)))
    output: Path | None = field(default=None, metadata=_told("save a grid of samples; signs are its last row"))

    def __post_init__(self) -> None:
        for name in ("k", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class PairSettings:
    """Settings of preference pairs, beside model, utility and prompts.

    Raises ValueError for what makes no sense.
    """

    temperature: float = 0.2
    steps: int = 20
    cfg: float = 1.0
    seed: int = 0
    batch_size: int = 96  # images a batch

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"the temperature must be positive and finite, got {self.temperature}")
        if self.steps < 1 or self.batch_size < 2:
            raise ValueError(f"steps ({self.steps}) must be at least 1, batch_size ({self.batch_size}) at least 2")


PRETRAIN = Command("python -m rlg.pretraining", PretrainingSettings, "Pretrain a base model of the tinyworld.")
SHOW = Command(
    "python -m rlg.pretraining.show",
    ShowSettings,
    "Look at a tinyworld base model: a grid of images, and its composition accuracy on prompts that it never saw.",
)

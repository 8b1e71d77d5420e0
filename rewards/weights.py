"""Files, precision and batches of rewards that are models.

Files come from NAME=SOURCE, else from the hub, whose client keeps what it has downloaded. Weights are safetensors, or
published .pt and .pth files, of which only tensors are read (`weights_only`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rewards import DifferentiableReward

BATCH = 32  # images of a forward pass
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")  # a folder with one of these has a tokenizer

Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass(frozen=True)
class Origin:
    """Place of a reward's files: file, folder or hub id."""

    reward: str
    place: str

    @classmethod
    def of(cls, reward: str, source: str | None, published: str) -> Origin:
        """Make it of SOURCE, or else of the published hub id."""
        return cls(reward, os.path.expanduser(source) if source else published)

    @property
    def folder(self) -> Path | None:
        """The local folder with the files, if they are local."""
        path = Path(self.place)
        return path if path.is_dir() else path.parent if path.is_file() else None

    def find(self, *names: str) -> Path:
        """Find a file: the place itself, or by name.

        In a folder it is the first of these names that exists. In the hub's repository it is the first name. Raises
        ValueError if it is not there.
        """
        if self.folder is None:
            try:
                return Path(hf_hub_download(self.place, names[0]))
            except Exception as error:  # the hub's client may raise anything
                raise self.absent(names[0], self.place, names[:1], error) from error
        if Path(self.place).is_file():
            return Path(self.place)
        found = [self.folder / name for name in names if (self.folder / name).is_file()]
        if not found:
            raise ValueError(f"reward {self.reward!r}: the folder {self.folder} holds no {' or '.join(names)}")
        return found[0]

    def tensors(self, file: Path) -> dict[str, Tensor]:
        """Tensors of a file by name, on the CPU.

        They are those under "state_dict" where a checkpoint has it. Raises ValueError for a file that cannot be read.
        """
        try:
            if file.suffix == ".safetensors":
                return load_file(file)
            content = torch.load(file, map_location="cpu", weights_only=True)
            content = content.get("state_dict", content)
            return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
        except Exception as error:  # torch and safetensors may raise anything
            raise self.unreadable(str(file), error) from error

    def tokenizer(self, kind: type[PreTrainedTokenizerBase], published: str) -> PreTrainedTokenizerBase:
        """The folder's own tokenizer, or else that of a hub id.

        Raises ValueError if that is not there.
        """
        own = self.folder is not None and any((self.folder / name).is_file() for name in VOCABULARIES)
        try:
            found = kind.from_pretrained(str(self.folder) if own else published)
            if not found.get_vocab().keys() - set(found.all_special_tokens):
                raise ValueError("found no vocabulary")  # transformers returns an empty tokenizer
            return found
        except Exception as error:
            raise self.absent("tokenizer", published, tuple(kind.vocab_files_names.values()), error) from error

    def absent(self, what: str, hub_id: str, files: Sequence[str], error: Exception) -> ValueError:
        """The error for something missing on the hub.

        It says how to get it.
        """
        command = " ".join(("hf download", hub_id, *files))
        return ValueError(
            f"reward {self.reward!r} has no {what} of {hub_id!r} here: `{command}` where there is a network, "
            f"or give a local copy, {self.reward}=PATH ({_reason(error)})"
        )

    def unreadable(self, what: str, error: Exception) -> ValueError:
        """The error for a damaged or mislabelled file."""
        return ValueError(f"reward {self.reward!r} cannot read {what}: {_reason(error)}")


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def assemble(
    kind: type[Model], config: PretrainedConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype, **options: Any
) -> Model:
    """A frozen transformers model with these tensors.

    options: those of the constructor. Raises ValueError for names and shapes that are not the model's.
    """
    with torch.device("meta"):
        expected = kind(config, **options).state_dict()
    if found := difference(expected, tensors):
        raise ValueError(found)
    model = kind.from_pretrained(None, config=config, state_dict=dict(tensors), dtype=dtype, **options)
    return model.requires_grad_(False)


def pretrained(kind: type[Model], what: str, origin: Origin, device: torch.device | str, dtype: torch.dtype) -> Model:
    """A frozen transformers model from a folder or the hub.

    what: its name in errors. Raises ValueError if it is not there, or is none of that kind in safetensors.
    """
    try:
        model, found = kind.from_pretrained(origin.place, use_safetensors=True, dtype=dtype, output_loading_info=True)
    except Exception as error:  # the hub and transformers may raise anything
        if origin.folder is None:
            raise origin.absent(what, origin.place, (), error) from error
        raise origin.unreadable(f"the {what} in {origin.place}", error) from error
    if missing := found["missing_keys"]:
        raise ValueError(f"reward {origin.reward!r}: {origin.place} is no {what}, it lacks {min(missing)}")
    return model.to(device).requires_grad_(False)


def renamed(name: str, rules: Sequence[tuple[str, str]]) -> str:
    """A tensor's name after all replacements (pattern, replacement) in turn."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """The first difference in names or shapes, as a sentence about `found`.

    It is empty if there is none.
    """
    for names, word in ((expected.keys() - found.keys(), "lacks"), (found.keys() - expected.keys(), "also holds")):
        if names:
            return f"it {word} {len(names)} tensors, first {min(names)}"
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            return f"{name} has shape {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
    return ""


def half_on_gpu(device: torch.device | str) -> torch.dtype:
    """The dtype fp16, but fp32 on the CPU."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.float16


class Score(Protocol):
    """(B,) scores of images in [0, 1] and prompts.

    rounded: the images are rounded to 256 levels, as published; without it the scores have a gradient.
    """

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str], *, rounded: bool) -> Tensor: ...


def batched(score: Score, *networks: nn.Module) -> DifferentiableReward:
    """A reward from a function of images and prompts.

    networks: the function's own. The reward calls it with at most `BATCH` images.
    """

    @torch.no_grad()
    def reward(images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        parts = [
            score(images_B3HW[start : start + BATCH], prompts[start : start + BATCH], rounded=True).float().cpu()
            for start in range(0, len(prompts), BATCH)
        ]
        return torch.cat(parts) if parts else torch.zeros(0)

    def unrounded(images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return score(images_B3HW, prompts, rounded=False)

    return DifferentiableReward(reward, unrounded, networks)

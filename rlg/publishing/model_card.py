"""Model card of an adapter: training, loading, effect of w.

It is the README.md in the adapter's folder, and follows from files: the checkpoint's config.yaml and
adapter_config.json, and the evaluations of the checkpoint, `../eval/*/summary.json`. Training writes it. An evaluation
and `python -m rlg.push` write it anew while it carries MARK. Without that line it is yours, and left alone. It states
a license only if someone gave one.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote

import huggingface_hub
import yaml
from huggingface_hub import ModelCard, ModelCardData

from rlg import tinyworld
from rlg.evaluation.methods import METHODS, RLG, method_of
from rlg.io import public_names, tables
from rlg.io.run_folder import CARD, CONFIG, CURVES, EVALUATIONS, SUMMARY, read_config
from rlg.io.tables import number
from rlg.models.adapter_files import DIFFUSERS_FILE, PEFT_CONFIG, PEFT_FOLDER, PEFT_WEIGHTS
from rlg.stats import PERCENT, Estimate

MARK = "<!-- Written by rlg from the run's files, and kept up to date. Remove this line to keep your own text. -->"
BASE_LICENSE = "license-of-the-base-model"
_BASE_LICENSES = {  # licenses in the cards of the bases of configs/
    "stabilityai/stable-diffusion-3.5-medium": "stabilityai-ai-community",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
}
_OF_THE_MACHINE = ("output_dir", "report_to", "project", "log_adapter", "push_to_hub", "hub_model_id", "image_root")
_PLAIN = (None, "constant")
_LOCAL_BASE = "a local model"


@dataclass(frozen=True)
class Evaluated:
    """An evaluation of the adapter."""

    folder: Path
    summary: dict[str, Any]


def files(checkpoint: Path) -> list[str]:
    """Files of a checkpoint that are published, by their name inside.

    They are the adapter in both formats, and the card; [] if there is no adapter. Of some families diffusers has no
    LoRA files, and their adapters are PEFT folders alone.
    """
    adapter = [f"{PEFT_FOLDER}/{PEFT_CONFIG}", f"{PEFT_FOLDER}/{PEFT_WEIGHTS}"]
    if not all((checkpoint / name).is_file() for name in adapter):
        return []
    return adapter + [name for name in (DIFFUSERS_FILE, CARD) if (checkpoint / name).is_file()]


def evaluations(checkpoint: Path) -> list[Evaluated]:
    """Finished evaluations in the run's folder, of this checkpoint alone, oldest first."""
    found = []
    for file in checkpoint.resolve().parent.glob(f"{EVALUATIONS}/*/{SUMMARY}"):
        try:
            summary = json.loads(file.read_bytes())
            adapter, meta = str(summary["adapter"]), summary["meta"]
        except (ValueError, TypeError, KeyError):
            continue  # it is another tool's, or cut off
        if PurePath(adapter).name == checkpoint.name and "blend_scale" not in meta:
            found.append(Evaluated(file.parent, summary))
    return sorted(found, key=lambda e: str(e.summary["meta"].get("created", "")))


def write(folder: Path, checkpoint: str | None = None, license: str | None = None) -> None:
    """Write the card into a folder with an adapter.

    A card of the user's own stays. checkpoint: the name it will have, where it is not the folder's. license: of the
    adapter, an id of the hub's; the default is that of an earlier card, or the config's `adapter_license`. Raises
    ValueError if config.yaml is damaged.
    """
    if is_users(folder):
        return
    card = render(folder, checkpoint or folder.name, license or stated(folder))
    temporary = folder / f".{CARD}.tmp"
    temporary.write_text(card, encoding="utf-8", errors="replace")
    temporary.replace(folder / CARD)


def is_users(folder: Path) -> bool:
    """Tell whether the folder has a card that is not ours."""
    card = folder / CARD
    return card.is_file() and MARK not in card.read_text(encoding="utf-8", errors="replace")


def update(checkpoint: Path) -> None:
    """Bring a card of ours up to date, if there is one."""
    card = checkpoint / CARD
    if card.is_file() and files(checkpoint):
        write(checkpoint)


def stated(folder: Path) -> str | None:
    """The license that the folder's card states; None if it states none."""
    data = _front_matter_of(folder / CARD)
    return data.license if data and isinstance(data.license, str) and data.license != "other" else None


def _front_matter_of(card: Path) -> ModelCardData | None:
    if not card.is_file():
        return None
    try:
        return ModelCard(card.read_text(encoding="utf-8", errors="replace"), ignore_metadata_errors=True).data
    except (ValueError, TypeError, yaml.YAMLError):
        return None


def render(folder: Path, checkpoint: str, license: str | None = None, figures: str = f"../{EVALUATIONS}") -> str:
    """The card's text.

    figures: path from the card to the evaluations' folders.
    """
    config = read_config(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    adapter = json.loads((folder / PEFT_FOLDER / PEFT_CONFIG).read_bytes())
    base = str(config.get("base") or adapter.get("base_model_name_or_path") or "")
    known = public_names.base(base, folder)
    shown = public_names.value({k: v for k, v in config.items() if k not in _OF_THE_MACHINE}, folder)
    license = license or config.get("adapter_license")
    title = f"{config.get('name') or folder.resolve().parent.name}, {checkpoint}"
    curves = "\n\n".join(_curve(each, figures) for each in evaluations(folder))
    front = _front_matter(known, license, config.get("data"), folder)
    note = _license_note(known, base_license(base), license)
    parts = [
        f"---\n{front}\n---\n{MARK}",
        f"# {text(title)}",
        "A LoRA of a text-to-image diffusion model, trained with reinforcement learning and made for guidance at "
        "inference, `base + w * (tuned - base)`: w = 0 is the base model, w = 1 the adapter, w > 1 goes beyond it.",
        _facts(known or _LOCAL_BASE, shown, adapter),
        f"## How to load\n\n{_fenced(_loading(known, (folder / DIFFUSERS_FILE).is_file()), 'python')}",
        f"## What w does\n\n{curves or 'It has not been evaluated yet.'}",
        f"## License\n\n{note}",
    ]
    if config:
        shown |= {"base": known or _LOCAL_BASE} if "base" in shown else {}
        parts.append(f"## Configuration\n\n{_fenced(yaml.safe_dump(shown, sort_keys=False).rstrip(), 'yaml')}")
    return "\n\n".join(parts) + "\n"


def text(value: Any) -> str:
    """Escape a text: one line of Markdown that only shows it."""
    line = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]()#|~!:@])", lambda match: f"&#{ord(match[0])};", line)


def _fenced(content: str, language: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{content}\n{fence}"


def _front_matter(base: str | None, license: str | None, training_data: Any, folder: Path) -> str:
    on_hub = base is not None and base not in tinyworld.NAMES
    data_on_hub = public_names.is_hub_id(str(training_data), folder)
    data = ModelCardData(
        base_model=base if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=license or "other",
        license_name=None if license else BASE_LICENSE,
        license_link=None if license or not on_hub else f"https://huggingface.co/{base}",
        datasets=[training_data] if data_on_hub else None,
        tags=["text-to-image", "diffusers", "lora", "peft", "reinforcement-learning", "rlg"],
    )
    return data.to_yaml().strip()


def _facts(base: str, config: Mapping[str, Any], adapter: Mapping[str, Any]) -> str:
    """A table of the run's settings, as others may see them."""
    weights = config.get("reward_weights")
    rewards = _list(config.get("reward"))
    if weights and len(weights) == len(rewards):
        rewards = [f"{weight:g} × {name}" for weight, name in zip(weights, rewards, strict=True)]
    rows = {
        "base model": base,
        "reward": ", ".join(map(str, rewards)),
        "held-out rewards": ", ".join(map(str, _list(config.get("held_out_reward")))),
        "beta": config.get("beta"),
        "training data": config.get("data") or config.get("prompts"),
        "iterations, at most": config.get("max_steps"),
        "learning rate": config.get("learning_rate"),
        "LoRA rank, alpha": f"{adapter.get('r')}, {adapter.get('lora_alpha')}",
        "classifier-free guidance while training": config.get("cfg"),
        "seed": config.get("seed"),
    }
    known = {name: value for name, value in rows.items() if value not in (None, "")}
    return tables.markdown(["", ""], [[name, text(value)] for name, value in known.items()])


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _loading(base: str | None, by_diffusers: bool) -> str:
    embedded = base in tinyworld.NAMES
    source = f"rlg.tinyworld.path({base!r})" if embedded else repr(base or "path/of/the/base")
    alone = f"""

# the tuned model alone, without rlg: w = 1
pipe = DiffusionPipeline.from_pretrained({source})
pipe.load_lora_weights("path/or/hub-id")"""
    return f"""\
from diffusers import DiffusionPipeline
import rlg

pipe = DiffusionPipeline.from_pretrained({source})
guide = rlg.apply(pipe, "path/or/hub-id")  # this folder, or USER/REPO
guide.scale = 1.5                          # w
image = pipe("a prompt").images[0]""" + (alone if by_diffusers else "")


def _curve(evaluated: Evaluated, at: str) -> str:
    """Settings, figure and points of an evaluation."""
    meta, points = evaluated.summary["meta"], evaluated.summary["points"]
    names = list(dict.fromkeys(name for point in points for name in point["rewards"]))
    trained = meta.get("trained_rewards", [])
    source = public_names.value(str(meta.get("prompts", "?")))
    parts = [f"{meta.get('num_prompts', '?')} prompts of {source}", f"{meta.get('k', '?')} images each"]
    parts += [f"{meta.get('sampler')} {meta.get('steps')} steps", f"CFG {meta.get('cfg')}"]
    parts += [
        f"{key} {public_names.value(meta[key])}" for key in ("schedule", "origin") if meta.get(key) not in _PLAIN
    ]
    heads = ["w", *(f"{name} ({'trained' if name in trained else 'held out'})" for name in names), "KL (nats)"]
    rows = []
    for point in sorted(points, key=lambda point: (method_of(point) != RLG, method_of(point), point["w"])):
        method = "" if method_of(point) == RLG else f", {_label(method_of(point))}"
        cells = [f"{point['w']:g}{method}", *(_mean(point["rewards"].get(name)) for name in names)]
        cells.append("" if point["kl"] is None else number(point["kl"], 3))
        rows.append([text(cell) for cell in cells])
    figure = f"![curves]({at}/{quote(evaluated.folder.name)}/{CURVES})"
    table = tables.markdown([text(head) for head in heads], rows)
    note = f"Means over images, with {PERCENT} intervals over prompts."
    return "\n\n".join([f"### {text(', '.join(parts))}", figure, table, note])


def _label(method: str) -> str:
    return METHODS[method].label if method in METHODS else method


def _mean(fields: Mapping[str, Any] | None) -> str:
    if fields is None:
        return ""
    return Estimate.of(fields["mean"], fields["ci95"]).text(number)


def base_license(base: str) -> str | None:
    """The license of a base model, by its card.

    It is that of a base in configs/, or in the base's folder, or in the hub's cache.
    """
    if base in tinyworld.NAMES or base in _BASE_LICENSES:
        return _BASE_LICENSES.get(base, "apache-2.0")
    cached = huggingface_hub.try_to_load_from_cache(base, CARD) if public_names.is_hub_id(base) else None
    data = _front_matter_of(Path(cached) if isinstance(cached, str) else Path(base, CARD))
    return (str(data.license_name or data.license or "") or None) if data else None


def _license_note(base: str | None, license_of_base: str | None, license: str | None) -> str:
    which = f" ({', '.join(map(text, filter(None, (base, license_of_base))))})" if base or license_of_base else ""
    if license:
        return f"The adapter: {text(license)}. The license of the base model{which} applies to what is made with both."
    return f"None is stated for the adapter. The license of the base model{which} applies."


def update_all(checkpoints: Iterable[Path]) -> None:
    """`update` each checkpoint."""
    for checkpoint in checkpoints:
        update(checkpoint)

"""The command line of a dataclass: the same result as TRL's parser, and mistakes in one line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rlg import config_parser
from tests.support.paths import ROOT
from trainers.adjoint_matching_config import AdjointMatchingConfig
from trainers.core.config import RunConfig, parse_config
from trainers.dpo_config import DPOConfig
from trainers.draft_config import DRaFTConfig
from trainers.grpo_config import GRPOConfig
from trainers.nft_config import NFTConfig
from trainers.rwr_config import RWRConfig
from trainers.spm_config import SPMConfig
from trainers.spo_config import SPOConfig
from trainers.vgg_flow_config import VGGFlowConfig

CONFIGS = ROOT / "configs"
KINDS = {
    "adjoint_matching": AdjointMatchingConfig,
    "dpo": DPOConfig,
    "draft": DRaFTConfig,
    "grpo": GRPOConfig,
    "nft": NFTConfig,
    "rwr": RWRConfig,
    "spm": SPMConfig,
    "spo": SPOConfig,
    "vgg_flow": VGGFlowConfig,
}
TINY_ONLINE = ["--base", "tiny-sd", "--name", "a", "--prompts", "p.txt"]
LINES = [
    (GRPOConfig, [*TINY_ONLINE, "--reward", "a", "b", "--no_skip_last_step", "--tf32", "no", "--beta", "0.5"]),
    (GRPOConfig, [*TINY_ONLINE, "--reward", "a", "--reward-weights", "2", "--window_end", "5", "--no-tf32"]),
    (GRPOConfig, [*TINY_ONLINE, "--reward", "a", "--gradient_checkpointing", "--compile", "Y", "--num_gen", "4"]),
    (DPOConfig, [*TINY_ONLINE, "--online", "--reward=a", "--loss_type=ipo", "--save_total_limit", "7", "--dry_run"]),
    (SPOConfig, [*TINY_ONLINE, "--preference_model", "m", "--lora_targets", "to_q", "to_k", "--overwrite", "1"]),
]


@dataclass(kw_only=True)
class Options:
    """A few of each kind."""

    needed: int = field(metadata={"help": "100% needed"})
    rate: float = field(default=0.25, metadata={"help": "a rate"})
    shine: bool = field(default=True, metadata={"help": "a switch"})
    names: list[str] = field(default_factory=list, metadata={"help": "names"})
    limit: int | None = field(default=3, metadata={"help": "a limit (none: all)"})


def written() -> list[tuple[type[RunConfig], Path]]:
    """Every config of a training in configs/, and what it is a config of; folders or file names say so."""
    trained = [*(CONFIGS / "tiny").glob("*_*.yaml"), *(CONFIGS / "equivalence").glob("[gr]*.yaml")]
    rows = [(next(kind for name, kind in KINDS.items() if file.name.startswith(name)), file) for file in trained]
    rows += [(KINDS[name], file) for name in ("dpo", "grpo", "spo") for file in (CONFIGS / name).glob("*.yaml")]
    return sorted([*rows, (SPOConfig, CONFIGS / "tiny" / "demo.yaml")], key=lambda row: row[1])


def test_it_reads_every_config_as_trl_does() -> None:
    assert len(written()) > 25
    for kind, file in written():
        argv = ["--config", str(file), "--seed", "7", "--no_tf32", "--max-steps", "3"]
        ours, theirs = config_parser.parse(kind, argv), parse_config(kind, argv)
        assert ours == theirs, file
        assert (ours.seed, ours.tf32, ours.max_steps) == (7, False, 3)


@pytest.mark.parametrize(("kind", "argv"), LINES)
def test_it_reads_command_lines_as_trl_does(kind: type[RunConfig], argv: list[str]) -> None:
    assert config_parser.parse(kind, argv) == parse_config(kind, argv)


def test_values_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("needed: 5\nrate: 1e-4\nshine: false\nlimit: null\nnames: [a, b]\n")
    read = config_parser.parse(Options, ["--config", str(file)])
    assert read == Options(needed=5, rate=1e-4, shine=False, names=["a", "b"], limit=None)  # YAML: 1e-4 is a text
    over = config_parser.parse(
        Options, [f"--config={file}", "--shine", "--rate", "2", "--names", "c", "--needed", "6"]
    )
    assert over == Options(needed=6, rate=2.0, shine=True, names=["c"], limit=None)
    assert config_parser.parse(Options, ["--needed", "1", "--no_shine"]) == Options(needed=1, shine=False)


@pytest.mark.parametrize(
    ("text", "argv", "said"),
    [
        ("need: 1\n", [], "c.yaml: unknown option need, did you mean needed?; see --help"),
        ("needed: 1\nqqq: 1\n", [], "c.yaml: unknown option qqq (is it a config of another command?); see --help"),
        ("needed: [1]\n", [], "c.yaml: needed must be int, got [1]"),
        ("needed: 1\nenv: {A: 1}\n", [], "c.yaml: env is not read here"),
        ("needed: 1\n", ["--rate", "inf"], "rate must be finite, got inf"),
        ("rate: 1\n", [], "the following arguments are required: --needed; see --help"),
        ("needed: 1\n", ["--shine", "perhaps"], "argument --shine: must be true or false, got 'perhaps'; see --help"),
        ("needed: 1\n", ["--rat", "1", "--nam"], "argument --names: expected at least one argument; see --help"),
        ("needed: 1\n", ["--nothing"], "unrecognized arguments: --nothing; see --help"),
    ],
)
def test_mistakes_are_told(
    text: str, argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises((ValueError, SystemExit)) as caught:
        config_parser.parse(Options, ["--config", str(tmp_path / "c.yaml"), *argv])
    told = capsys.readouterr().err if isinstance(caught.value, SystemExit) else str(caught.value)
    assert said in told
    assert told.count("\n") <= 1


def test_help_says_each_default_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        config_parser.parse(Options, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    assert "100% needed --rate" in text and "a rate (default: 0.25)" in text
    assert "a switch (default: True) --no_shine turn --shine off" in text
    assert "a limit (none: all) (default: 3)" in text

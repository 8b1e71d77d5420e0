"""Detect the emoji world's things by a small network.

The network learns from drawn scenes where things are. It is a second opinion: it shares no code with the reward's
detector, `rewards.detectors.matching`, and no reward uses it. `rlg.pretraining.agreement` compares the two. For each
square of 4 x 4 pixels the network says which drawing has its centre there, or none (as CenterNet, arXiv 1904.07850,
with one softmax and no offsets).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from rewards.detectors.detection import Detection
from rewards.detectors.sprites import DRAWINGS, SIZES
from rlg.pretraining.stage import generator_of, learning_rate
from rlg.tinyworld import emoji

STRIDE = 4  # pixels, side of a square
NOTHING, UNSAID = len(DRAWINGS), -100  # classes: no centre here; beside a centre, where no answer is asked
_APART = 20  # pixels between two centres along one axis, at least
_WIDTH, _BATCH, _PEAK, _WARMUP = 64, 32, 2e-3, 100
_THING_WEIGHT = 8.0  # of a centre against an empty square in the loss; there are 256 squares and 1 to 4 things


class Residual(nn.Module):
    """Two convolutions beside an identity; the first is dilated."""

    def __init__(self, dilation: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(8, _WIDTH),
            nn.SiLU(),
            nn.Conv2d(_WIDTH, _WIDTH, 3, padding=dilation, dilation=dilation),
            nn.GroupNorm(8, _WIDTH),
            nn.SiLU(),
            nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The input and what is learnt."""
        return x_BCHW + self.layers(x_BCHW)


def network() -> nn.Sequential:
    """Images (B, 3, 64, 64) in [0, 1] to logits (B, drawings + 1, 16, 16)."""
    return nn.Sequential(
        nn.Conv2d(3, _WIDTH // 2, 5, stride=2, padding=2),
        nn.SiLU(),
        nn.Conv2d(_WIDTH // 2, _WIDTH, 5, stride=2, padding=2),
        *(Residual(dilation) for dilation in (1, 2, 1, 2, 1)),
        nn.GroupNorm(8, _WIDTH),
        nn.SiLU(),
        nn.Conv2d(_WIDTH, NOTHING + 1, 1),
    )


def targets(layouts: list[list[emoji.Placed]]) -> Tensor:
    """Class (B, 16, 16) of each square; the eight around a centre are `UNSAID`."""
    side = emoji.SIZE // STRIDE
    target_BHW = torch.full((len(layouts), side, side), NOTHING)
    squares = [
        (row, int((y + size / 2) / STRIDE), int((x + size / 2) / STRIDE), index)
        for row, placed in enumerate(layouts)
        for index, x, y, size in placed
    ]
    for row, y, x, _ in squares:
        target_BHW[row, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2] = UNSAID
    for row, y, x, index in squares:
        target_BHW[row, y, x] = index
    return target_BHW


def names(layouts: list[list[emoji.Placed]]) -> list[list[tuple[str, str]]]:
    """Noun and colour of each thing."""
    return [[DRAWINGS[index] for index, *_ in placed] for placed in layouts]


def spoilt(images_B3HW: Tensor, generator: torch.Generator) -> Tensor:
    """Spoil images by chance, as a half-trained model does.

    Each becomes more or less blurred, paler or darker, and noisy.
    """
    count = len(images_B3HW)
    share_B111, gain_B111, noise_B111 = torch.rand(3, count, 1, 1, 1, generator=generator)
    blurred = functional.avg_pool2d(functional.pad(images_B3HW, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images_B3HW = images_B3HW + share_B111 * (blurred - images_B3HW)
    images_B3HW = 1 - (0.8 + 0.3 * gain_B111) * (1 - images_B3HW)
    return (images_B3HW + 0.06 * noise_B111 * torch.randn(images_B3HW.shape, generator=generator)).clamp(0, 1)


def scenes(count: int, generator: torch.Generator) -> tuple[Tensor, list[list[emoji.Placed]]]:
    """Draw scenes, half on soft paper, and tell where things lie."""
    prompts = emoji.training_prompts(count, generator)
    layouts = [emoji.layout(prompt.metadata, generator) for prompt in prompts]
    soft = count // 2
    papers = [emoji.papers(soft, generator, soft=True), emoji.papers(count - soft, generator, soft=False)]
    return emoji.drawn(torch.cat(papers), layouts), layouts


def train(steps: int, seed: int) -> nn.Sequential:
    """A network trained on fresh scenes in each step, spoilt ones."""
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-4)
    weight = torch.full((NOTHING + 1,), _THING_WEIGHT)
    weight[NOTHING] = 1.0
    for step in tqdm(range(steps), desc="second detector", mininterval=2):
        generator = generator_of(seed, step)
        images, layouts = scenes(_BATCH, generator)
        logits = model(spoilt(images, generator))
        loss = functional.cross_entropy(logits, targets(layouts), weight, ignore_index=UNSAID)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, _PEAK, _WARMUP, decay=0.8)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def detect(model: nn.Module, images_B3HW: Tensor) -> list[list[Detection]]:
    """Find the things in each image, best first.

    A drawing is found where it is likelier than nothing, and likelier than all drawings near it.
    """
    return [_read(share_CHW) for share_CHW in model(images_B3HW).softmax(dim=1)]


def _read(share_CHW: Tensor) -> list[Detection]:
    side = share_CHW.shape[-1]
    score_HW, index_HW = share_CHW[:NOTHING].max(dim=0)
    score_HW = torch.where(score_HW > share_CHW[NOTHING], score_HW, 0.0)
    reach, found = -(-_APART // STRIDE), []
    while (score := float(score_HW.max())) > 0:
        y, x = divmod(int(score_HW.argmax()), side)
        found.append(_detection(int(index_HW[y, x]), y, x, score))
        score_HW[max(0, y - reach + 1) : y + reach, max(0, x - reach + 1) : x + reach] = 0
    return found


def _detection(index: int, y: int, x: int, score: float) -> Detection:
    half = sum(SIZES) / 4
    middle = ((x + 0.5) * STRIDE, (y + 0.5) * STRIDE)
    box = (middle[0] - half, middle[1] - half, middle[0] + half, middle[1] + half)
    return Detection(*DRAWINGS[index], box, score)

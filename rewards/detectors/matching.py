"""Detect the emoji world's things by matching with the known drawings.

Each drawing is laid over every place of the image, in a few sizes.

An image I = B + D lies on paper B; a drawing with colours s and opacity a would add t = a (s - B) to it. Both D and t
pass a filter first: a difference of Gaussians, so that neither blur nor the mere tone of an area counts much. The
score of a drawing at a place, over its square window, is

    2 <D, t> / (|D|^2 + |t|^2)  =  1 - |D - t|^2 / (|D|^2 + |t|^2)

which is 1 where the drawing is there, and near 0 on empty paper. It falls with a wrong colour, a wrong shape, and with
what lies in the window beside the drawing. The best score wins, and so on among the places that are left. There are no
weights. An image takes some milliseconds on one core, by FFT.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from rewards.detectors.detection import Detection
from rewards.detectors.sprites import DRAWINGS, drawings

SIDE = 64  # pixels; images of another size are resized to it
MATCHED_SIZES = (26, 29)  # pixels; the sizes of scenes, 25 to 30, differ by one at most
MIN_SCORE = 0.77  # below it there is no recognisable object
_APART = 20  # pixels between the centres of two objects, at least, along one axis
_FINE, _COARSE, _COARSE_SHARE = 1.0, 4.0, 0.9  # pixels, of the two Gaussians; what is taken off of the second
_PAPER_STEPS = 2
_PAPER_WIDTH = 0.08  # RGB; pixels that differ from the paper by more hardly count for its estimate


@dataclass(frozen=True)
class _Templates:
    """All drawings of one size, ready to be correlated. N: drawings, F: frequencies, P: places of a window."""

    size: int
    spectra_N4F: Tensor  # conjugates of the transforms of 2 a s (3 channels) and of -2 a, both filtered
    energy_N6: Tensor  # |t|^2 + |D|^2 as a form in (1, paper's three channels, |paper|^2, |D|^2)

    def scores(self, spectrum_4F: Tensor, energy_HW: Tensor, paper_3HW: Tensor) -> Tensor:
        """Scores (N, y, x) of the drawings, by their upper left corners."""
        places = SIDE - self.size + 1
        product_NF = (spectrum_4F * self.spectra_N4F).sum(dim=1)
        twice_NHW = torch.fft.irfft2(product_NF, s=(SIDE, SIDE))[:, :places, :places]
        window_1P = functional.avg_pool2d(energy_HW[None], self.size, stride=1).flatten(1) * self.size**2
        middle = slice(self.size // 2, self.size // 2 + places)
        paper_3P = paper_3HW[:, middle, middle].flatten(1)
        form_6P = torch.cat([torch.ones_like(window_1P), paper_3P, paper_3P.square().sum(0, True), window_1P])
        return twice_NHW / (self.energy_N6 @ form_6P).view_as(twice_NHW)


@cache
def _templates(size: int) -> _Templates:
    margin = round(3 * _COARSE)
    around_N4HW = functional.pad(drawings(size), (margin,) * 4)
    pieces_N4HW = _filtered(around_N4HW)[:, :, margin:-margin, margin:-margin]
    color_N3HW, alpha_N1HW = pieces_N4HW[:, :3], pieces_N4HW[:, 3:]
    spectra = torch.fft.rfft2(2 * torch.cat([color_N3HW, -alpha_N1HW], dim=1), s=(SIDE, SIDE))
    squares_N1 = color_N3HW.square().sum(dim=(1, 2, 3))[:, None]
    mixed_N3, opacity_N1 = (color_N3HW * alpha_N1HW).sum(dim=(2, 3)), alpha_N1HW.square().sum(dim=(2, 3))
    energy_N6 = torch.cat([squares_N1, -2 * mixed_N3, opacity_N1, torch.ones_like(squares_N1)], dim=1)
    return _Templates(size, spectra.conj().resolve_conj(), energy_N6)


@cache
def _gaussian(sigma: float) -> Tensor:
    """Weights of a Gaussian, of odd length and of sum 1."""
    reach = round(3 * sigma)
    weights = torch.exp(-torch.arange(-reach, reach + 1).float().square() / (2 * sigma**2))
    return weights / weights.sum()


def _blurred(images_BCHW: Tensor, sigma: float) -> Tensor:
    """Blurred by a Gaussian, with zeros around."""
    planes_N1HW = images_BCHW.reshape(-1, 1, *images_BCHW.shape[-2:])
    weights = _gaussian(sigma)
    reach = len(weights) // 2
    planes_N1HW = functional.conv2d(planes_N1HW, weights.view(1, 1, 1, -1), padding=(0, reach))
    return functional.conv2d(planes_N1HW, weights.view(1, 1, -1, 1), padding=(reach, 0)).view_as(images_BCHW)


def _filtered(images_BCHW: Tensor) -> Tensor:
    """Keep details finer than an area's tone and coarser than noise."""
    return _blurred(images_BCHW, _FINE) - _COARSE_SHARE * _blurred(images_BCHW, _COARSE)


def detect(image_3HW: Tensor) -> list[Detection]:
    """Find the objects in one image, best first.

    The image is float RGB (3, H, W) in [0, 1]. Boxes are in pixels of the image at 64 x 64.
    """
    if image_3HW.numel() == 0:
        return []
    image_3HW = _resized(image_3HW.detach().float().cpu())
    best_HW, index_HW = _best(image_3HW)
    found: list[Detection] = []
    while (score := float(best_HW.max())) >= MIN_SCORE:
        y, x = divmod(int(best_HW.argmax()), SIDE)
        found.append(_detection(int(index_HW[y, x]), y, x, score))
        best_HW[max(0, y - _APART + 1) : y + _APART, max(0, x - _APART + 1) : x + _APART] = -1
    return found


def _resized(image_3HW: Tensor) -> Tensor:
    image_3HW = image_3HW.nan_to_num().clamp(0, 1)
    if image_3HW.shape[1:] == (SIDE, SIDE):
        return image_3HW
    return functional.interpolate(image_3HW[None], (SIDE, SIDE), mode="bilinear", antialias=True)[0]


def _best(image_3HW: Tensor) -> tuple[Tensor, Tensor]:
    """Best score of an object centred at each pixel, and its index.

    The index counts drawings, and then sizes.
    """
    paper_3HW = paper(image_3HW)
    rest_3HW = _filtered((image_3HW - paper_3HW)[None])[0]
    channels_4HW = torch.cat([rest_3HW, (rest_3HW * paper_3HW).sum(dim=0, keepdim=True)])
    spectrum_4F, energy_HW = torch.fft.rfft2(channels_4HW), rest_3HW.square().sum(dim=0)
    best_HW, index_HW = torch.full((SIDE, SIDE), -1.0), torch.zeros(SIDE, SIDE, dtype=torch.long)
    for rank, size in enumerate(MATCHED_SIZES):
        scores_HW, drawing_HW = _templates(size).scores(spectrum_4F, energy_HW, paper_3HW).max(dim=0)
        middle = slice(size // 2, size // 2 + len(scores_HW))
        better = scores_HW > best_HW[middle, middle]
        best_HW[middle, middle] = torch.where(better, scores_HW, best_HW[middle, middle])
        index_HW[middle, middle] = torch.where(better, drawing_HW + rank * len(DRAWINGS), index_HW[middle, middle])
    return best_HW, index_HW


def _detection(index: int, y: int, x: int, score: float) -> Detection:
    rank, drawing = divmod(index, len(DRAWINGS))
    size = MATCHED_SIZES[rank]
    left, top = x - size // 2, y - size // 2
    return Detection(*DRAWINGS[drawing], (float(left), float(top), float(left + size), float(top + size)), score)


def paper(image_3HW: Tensor) -> Tensor:
    """Background (3, 64, 64) of an image: one fitted plane a channel.

    The fit begins with the border's median; pixels far from the plane lose their weight (Geman-McClure).
    """
    axis = torch.linspace(-1, 1, SIDE)
    basis_P3 = torch.stack([torch.ones(SIDE, SIDE), axis.expand(SIDE, SIDE), axis[:, None].expand(SIDE, SIDE)], -1)
    basis_P3, pixels_P3 = basis_P3.reshape(-1, 3), image_3HW.reshape(3, -1).T
    border = basis_P3[:, 1:].abs().amax(dim=1) == 1
    plane_P3 = pixels_P3[border].median(dim=0).values.expand_as(pixels_P3)
    for _ in range(_PAPER_STEPS):
        distance_P = (pixels_P3 - plane_P3).square().sum(dim=1)
        weight_P1 = (1 + distance_P / _PAPER_WIDTH**2).pow(-2)[:, None]
        normal = basis_P3.T @ (weight_P1 * basis_P3) + 1e-3 * torch.eye(3)
        plane_P3 = basis_P3 @ torch.linalg.solve(normal, basis_P3.T @ (weight_P1 * pixels_P3))
    return plane_P3.T.reshape(3, SIDE, SIDE)

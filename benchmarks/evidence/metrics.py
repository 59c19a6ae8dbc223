"""How good a segmentation is: mIoU, accuracy, cross-entropy, and boundaries by IoU and by F."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data import VOID

#: How far from a boundary, in pixels of the labels, a prediction still counts.
TOLERANCES = (1, 2)


class Metrics:
    """Sums over a split, from which the figures come."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.confusion = torch.zeros(classes, classes, dtype=torch.float64)
        self.loss = 0.0
        self.bands = {far: torch.zeros(2, classes, dtype=torch.float64) for far in TOLERANCES}
        self.matches = {far: torch.zeros(4, dtype=torch.float64) for far in TOLERANCES}

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count logits (N, classes, H, W) against labels (N, H, W)."""
        known = labels != VOID
        self.loss += float(F.cross_entropy(logits.double(), labels, ignore_index=VOID, reduction="sum"))
        predicted = logits.argmax(dim=1)
        pairs = labels[known] * self.classes + predicted[known]
        self.confusion += torch.bincount(pairs, minlength=self.classes**2).view(self.classes, -1)
        self._add_bands(predicted, labels, known)
        self._add_matches(predicted, labels, known)

    def _add_bands(self, predicted: Tensor, labels: Tensor, known: Tensor) -> None:
        """The parts of each class's masks within d pixels of their boundaries (Cheng et al., CVPR 2021)."""
        of_classes = [F.one_hot(each.where(known, 0), self.classes).permute(0, 3, 1, 2) for each in (predicted, labels)]
        masks = [(each.bool() & known.unsqueeze(1)).float() for each in of_classes]
        for far in TOLERANCES:
            bands = [(mask - _eroded(mask, far)) > 0 for mask in masks]
            both, either = bands[0] & bands[1], bands[0] | bands[1]
            self.bands[far] += torch.stack([both.sum(dim=(0, 2, 3)), either.sum(dim=(0, 2, 3))])

    def _add_matches(self, predicted: Tensor, labels: Tensor, known: Tensor) -> None:
        """Boundary pixels of each, and those of them that have one of the other's within d pixels (Csurka et al., BMVC 2013)."""
        edges = [_edges(each.where(known, VOID), known) for each in (predicted, labels)]
        for far in TOLERANCES:
            near = [F.max_pool2d(edge, 2 * far + 1, 1, far) for edge in edges]
            found = [edges[0].sum(), (edges[0] * near[1]).sum(), edges[1].sum(), (edges[1] * near[0]).sum()]
            self.matches[far] += torch.stack(found).double()

    def result(self) -> dict[str, Any]:
        """The figures, in percent but for the cross-entropy; classes that nowhere occur do not count."""
        hit = self.confusion.diag()
        either = self.confusion.sum(0) + self.confusion.sum(1) - hit
        there = self.confusion.sum(1) > 0
        found = {
            "miou": 100 * float((hit / either)[there].mean()),
            "accuracy": 100 * float(hit.sum() / self.confusion.sum()),
            "cross_entropy": self.loss / float(self.confusion.sum()),
        }
        for far in TOLERANCES:
            both, either = self.bands[far]
            found[f"boundary_iou_{far}"] = 100 * float((both / either.clamp(min=1))[there].mean())
            mine, mine_near, theirs, theirs_near = map(float, self.matches[far])
            precision, recall = mine_near / max(mine, 1.0), theirs_near / max(theirs, 1.0)
            found[f"boundary_f_{far}"] = 100 * 2 * precision * recall / max(precision + recall, 1e-12)
        return found


def _eroded(mask: Tensor, far: int) -> Tensor:
    """A mask (N, C, H, W) without what is within d pixels of its outside; the edge of the image is none of it."""
    return 1 - F.max_pool2d(1 - mask, 2 * far + 1, 1, far)


def _edges(labels: Tensor, known: Tensor) -> Tensor:
    """(N, 1, H, W): 1 where a pixel's right or lower neighbour has another label, and both are known."""
    edges = torch.zeros(labels.shape, dtype=torch.bool)
    edges[:, :, :-1] |= (labels[:, :, :-1] != labels[:, :, 1:]) & known[:, :, :-1] & known[:, :, 1:]
    edges[:, :-1] |= (labels[:, :-1] != labels[:, 1:]) & known[:, :-1] & known[:, 1:]
    return edges.float().unsqueeze(1)

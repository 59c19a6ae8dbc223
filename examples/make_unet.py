"""Build a segmentation model as one would without upswap, and save it whole: `unet.pt`, or the name given."""

import sys

import segmentation_models_pytorch as smp
import torch


def main(path: str = "unet.pt") -> None:
    """Write a Unet with random weights to `path`."""
    torch.manual_seed(0)
    model = smp.Unet("resnet34", encoder_weights=None, classes=3)
    torch.save(model, path)
    print(f"{path}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main(*sys.argv[1:2])

"""Load a converted model and train it: ten steps on one batch of random images and masks, the loss going down.

    python examples/finetune.py unet.upswap.pt

The upsamplers train with the rest of the model at the same learning rate, as in DySample's published configurations.
"""

import sys

import torch
from torch.nn import functional as F

import upswap

STEPS = 10


def main(path: str = "unet.upswap.pt") -> list[float]:
    """Train the model in `path` for a few steps; the loss before each and after the last."""
    torch.manual_seed(0)
    model = upswap.load(path).train()
    upsamplers = upswap.upsamplers(model)
    print(f"{type(model).__name__} with {len(upsamplers)} upsamplers: {', '.join(upsamplers)}")

    images = torch.randn(4, 3, 128, 128)
    # Coarse random masks: large patches of one class each, something that can be learned.
    masks = F.interpolate(torch.randint(0, 3, (4, 1, 8, 8)).float(), size=(128, 128)).long().squeeze(1)
    optimizer = torch.optim.AdamW(upswap.param_groups(model, lr=1e-3))

    before = [p.detach().clone() for p in upswap.parameters(model)]
    losses: list[float] = []
    for step in range(STEPS + 1):
        loss = F.cross_entropy(model(images), masks)
        losses.append(loss.item())
        print(f"step {step:2}  loss {losses[-1]:.4f}")
        if step < STEPS:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    moved = sum(not torch.equal(old, new) for old, new in zip(before, upswap.parameters(model), strict=True))
    print(f"{moved} of {len(before)} upsampler parameters moved")
    if not (losses[-1] < losses[0] and moved == len(before)):
        sys.exit("the model did not train")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:2])

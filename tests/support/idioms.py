"""Models whose resizes stand outside their forward: in functions, lambdas, base classes, decorators, checkpointed segments."""

from __future__ import annotations

import functools
import warnings
from collections import OrderedDict

import torch
import torchvision.transforms.functional
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Base(nn.Module):
    """Convolutions at two sizes, and one after them."""

    def __init__(self) -> None:
        super().__init__()
        self.high = nn.Conv2d(3, 8, 3, padding=1)
        self.low = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.last = nn.Conv2d(8, 2, 1)

    def both(self, image):
        high = self.high(image)
        return high, self.low(high)


# -- functions of the module the class stands in -----------------------------------------------------------------------


def double(x, mode="nearest"):
    """A docstring."""
    return F.interpolate(x, scale_factor=2, mode=mode)


def like(x, other, *, align=False):
    if x.shape[-2:] != other.shape[-2:]:
        return F.interpolate(x, size=other.shape[-2:], mode="bilinear", align_corners=align)
    return x


def like_through(x, other):
    return like(x, other) + 1


def twice(x):
    for _ in range(2):
        x = F.interpolate(x, scale_factor=2)
    return x


class Helper(Base):
    def forward(self, image):
        high, low = self.both(image)
        return self.last(high + double(low))


class HelperTwice(Base):
    def forward(self, image):
        high, low = self.both(image)
        return self.last(high + double(low) + like(self.low(low), high, align=True))


class HelperInLoop(Base):
    """The helper resizes two of the three, whichever those are."""

    def forward(self, image):
        high, low = self.both(image)
        return self.last(sum(like(x, high) for x in (high, low, self.low(low))))


def counted(x):
    counted.calls = getattr(counted, "calls", 0) + 1
    return F.interpolate(x, scale_factor=2)


class HelperThatNamesItself(Base):
    """A function that mentions its own name, and a method that mentions its class."""

    def forward(self, image):
        high, low = self.both(image)
        return self.last(high + counted(low) + self.doubled(low))

    def doubled(self, x):
        return HelperThatNamesItself.plain(F.interpolate(x, scale_factor=2))

    @staticmethod
    def plain(x):
        return x


class FromTorchvision(Base):
    def forward(self, image):
        high, low = self.both(image)
        return self.last(high + torchvision.transforms.functional.resize(low, list(high.shape[-2:]), antialias=False))


def enlarged(x, times):
    return enlarged(F.interpolate(x, scale_factor=2), times - 1) if times else x


class CallsItself(Base):
    """A function that calls itself, which is one line for all of its runs."""

    def forward(self, image):
        high, low = self.both(image)
        return self.last(high + enlarged(low, 1) + enlarged(self.low(low), 2))


class HelperOfHelper(Base):
    def forward(self, image):
        high, low = self.both(image)
        return self.last(like_through(low, high) + like(self.low(low), high))


class LoopInHelper(Base):
    def forward(self, image):
        high, low = self.both(image)
        return self.last(high + twice(self.low(low)))


class Choice(Base):
    def forward(self, image, same=True):
        high, low = self.both(image)
        resize = double if same else like_double
        return self.last(high + resize(low))


def like_double(x):
    return F.interpolate(x, scale_factor=2, mode="nearest") * 2


class Static(Base):
    @staticmethod
    def up(x):
        return F.interpolate(x, scale_factor=2)

    @classmethod
    def down(cls, x):
        return cls.up(x) - 1

    def forward(self, image):
        high, low = self.both(image)
        return self.last(high + self.up(low) + self.down(low))


class Resizer:
    """No module."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return F.interpolate(x, scale_factor=self.factor)

    def run(self, x):
        return F.interpolate(x, scale_factor=self.factor)


class PlainObject(Base):
    def __init__(self):
        super().__init__()
        self.resizer = Resizer(2)

    def forward(self, image):
        high, low = self.both(image)
        return self.last(high + self.resizer.run(low))


class Mapped(Base):
    """Handed to a function of Python's that calls it."""

    def forward(self, image):
        high, low = self.both(image)
        return self.last(high + next(map(double, [low])))


# -- lambdas, partials -------------------------------------------------------------------------------------------------


class Lambda(Base):
    def __init__(self):
        super().__init__()
        factor = 2
        self.up, self.more = lambda x: F.interpolate(x, scale_factor=factor), lambda x: F.interpolate(x, scale_factor=4)

    def forward(self, image):
        high, low = self.both(image)
        return self.last(high + self.up(low) + self.more(self.low(low)))


class LocalLambda(Base):
    def forward(self, image):
        high, low = self.both(image)
        up = lambda x: F.interpolate(x, size=high.shape[2:])  # noqa: E731 - as people write it
        return self.last(high + up(low) + up(self.low(low)))


class Partial(Base):
    def __init__(self):
        super().__init__()
        self.up = functools.partial(double, mode="bicubic")
        self.resize = functools.partial(F.interpolate, scale_factor=2, mode="bilinear")

    def forward(self, image):
        high, low = self.both(image)
        return self.last(high + self.up(low) + self.resize(low))


class Table(Base):
    ways = {"up": double}  # noqa: RUF012

    def forward(self, image):
        high, low = self.both(image)
        return self.last(high + self.ways["up"](low))


# -- base classes, methods, decorators ---------------------------------------------------------------------------------


class Straight(Base):
    def forward(self, image):
        high, low = self.both(image)
        return self.last(high + F.interpolate(low, size=high.shape[-2:], mode="bilinear", align_corners=True))

    def up(self, x, factor):
        return F.interpolate(x, scale_factor=factor)


class Inherited(Straight):
    def forward(self, image):
        return super().forward(image) + 1


class InheritedByName(Straight):
    def forward(self, image):
        return super(InheritedByName, self).forward(image=image) + 1  # noqa: UP008


class InheritedTwice(Inherited):
    def forward(self, image):
        return super().forward(image) * 2


class InheritedMethod(Straight):
    def up(self, x, factor):
        return super().up(x, factor) - 1

    def forward(self, image):
        high, low = self.both(image)
        return self.last(high + self.up(low, 2) + self.up(self.low(low), 4))


class ByName(Straight):
    """The base class's forward by its name."""

    def forward(self, image):
        return Straight.forward(self, image) + 1


class Lines(Base):
    """The pyramid of many a repository: one method, a line a level."""

    def merge(self, x, y):
        return F.interpolate(x, size=y.shape[2:]) + y

    def forward(self, image):
        high, low = self.both(image)
        middle = self.merge(self.low(low), low)
        return self.last(self.merge(middle, high))


class MethodInLoop(Lines):
    def forward(self, image):
        maps = [*self.both(image)]
        maps.append(self.low(maps[-1]))
        x = maps.pop()
        while maps:
            x = self.merge(x, maps.pop())
        return self.last(x)


def plus_one(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs) + 1

    return wrapper


class Decorated(Base):
    @torch.autocast("cpu", enabled=False)
    def forward(self, image):
        high, low = self.both(image)
        return self.last(high + F.interpolate(low, scale_factor=2))


class DecoratedTwice(Base):
    @plus_one
    @plus_one
    def forward(self, image, *, factor=2):
        high, low = self.both(image)
        return self.last(high + F.interpolate(low, scale_factor=factor))


class DecoratedMethod(Base):
    @plus_one
    def up(self, x):
        return F.interpolate(x, scale_factor=2)

    def forward(self, image):
        high, low = self.both(image)
        return self.last(high + self.up(low))


def checked(*kinds):
    """A decorator with arguments, whose wrapper names the module and branches."""

    def decorate(function):
        @functools.wraps(function)
        def wrapper(self, *args, **kwargs):
            return function(self, *[x.contiguous() if isinstance(x, kinds) else x for x in args], **kwargs)

        return wrapper

    return decorate


class DecoratedMethodTwice(Base):
    """Two calls of a decorated method, and two of one in a loop."""

    @checked(torch.Tensor)
    @plus_one
    def up(self, x, factor=2):
        return F.interpolate(x, scale_factor=factor)

    def forward(self, image):
        high, low = self.both(image)
        x = high + self.up(low) + self.up(self.low(low), 4)
        for y in (low, low * 2):
            x = x + self.up(y)
        return self.last(x)


@plus_one
def decorated_double(x):
    return F.interpolate(x, scale_factor=2)


class DecoratedHelper(Base):
    def forward(self, image):
        high, low = self.both(image)
        return self.last(high + decorated_double(low))


class PartialMethod(Straight):
    """The forward is another method with some of its arguments given."""

    def run(self, image, factor):
        high, low = self.both(image)
        return self.last(high + F.interpolate(low, scale_factor=factor))

    forward = functools.partialmethod(run, factor=2)


class UpConv(nn.Upsample):
    """An `nn.Upsample` of one's own, with a convolution after it."""

    def __init__(self, mode):
        super().__init__(scale_factor=2, mode=mode)
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.conv(super().forward(x))


class UpTwice(nn.UpsamplingBilinear2d):
    def forward(self, x):
        return nn.UpsamplingBilinear2d.forward(self, nn.Upsample.forward(self, x))


class SubclassedLayers(Base):
    def __init__(self):
        super().__init__()
        self.up, self.twice = UpConv("nearest"), UpTwice(scale_factor=2)

    def forward(self, image):
        high, low = self.both(image)
        return self.last(high + self.up(low) + self.twice(self.low(low)))


class ScriptedPart(Base):
    """A part that is compiled by TorchScript, beside a resize."""

    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.gain = torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()))

    def forward(self, image):
        high, low = self.both(image)
        return self.last(high + F.interpolate(self.gain(low), scale_factor=2))


# -- checkpointed segments ---------------------------------------------------------------------------------------------


class CheckpointedHelper(Base):
    reentrant = False

    def forward(self, image):
        high, low = self.both(image)
        return self.last(high + checkpoint(double, low, use_reentrant=self.reentrant))


class CheckpointedLocal(Base):
    """Two runs of a local function with a loop in it: made again in the backward pass, the loops count anew."""

    reentrant = False

    def forward(self, image):
        high, low = self.both(image)

        def segment(x):
            for factor in (2, 1, 2):
                x = self.low(F.interpolate(x, scale_factor=factor)) if factor == 1 else F.interpolate(x, scale_factor=2)
            return x

        low = checkpoint(segment, self.low(low), use_reentrant=self.reentrant)
        return self.last(high + checkpoint(segment, low, use_reentrant=self.reentrant))


class CheckpointedLambda(Base):
    reentrant = False

    def forward(self, image):
        high, low = self.both(image)
        x = checkpoint(lambda x: F.interpolate(self.low(x), scale_factor=4), low, use_reentrant=self.reentrant)
        return self.last(high + x)


class CheckpointedMethod(Base):
    reentrant = False

    def segment(self, x):
        return self.up(self.low(x)) + F.interpolate(self.low(x), scale_factor=2)

    def up(self, x):
        return F.interpolate(x, scale_factor=2)

    def forward(self, image):
        high, _ = self.both(image)
        return self.last(checkpoint(self.segment, high, use_reentrant=self.reentrant))


class CheckpointedResize(Base):
    """The resize itself is what the model hands to torch: a function, and a layer at two places."""

    reentrant = False

    def __init__(self):
        super().__init__()
        self.up = nn.Upsample(scale_factor=2)

    def forward(self, image):
        high, low = self.both(image)
        x = low + checkpoint(self.up, self.low(low), use_reentrant=self.reentrant)
        x = checkpoint(self.up, x, use_reentrant=self.reentrant)
        return self.last(high + x + checkpoint(F.interpolate, low, None, 2.0, use_reentrant=self.reentrant))


class ReentrantResize(CheckpointedResize):
    reentrant = True


class ReentrantHelper(CheckpointedHelper):
    reentrant = True


class ReentrantLocal(CheckpointedLocal):
    reentrant = True


class ReentrantLambda(CheckpointedLambda):
    reentrant = True


class ReentrantMethod(CheckpointedMethod):
    reentrant = True


# -- owners that run their children ------------------------------------------------------------------------------------


class Runs(nn.Sequential):
    """An upsampler put into it would be run too."""

    def forward(self, x):
        for module in self:
            x = module(x)
        return F.interpolate(x, scale_factor=2.0)


class InContainer(Base):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Runs(nn.Conv2d(8, 8, 1)), Runs(nn.Conv2d(8, 8, 1), nn.ReLU())])

    def forward(self, image):
        high, low = self.both(image)
        for block in self.blocks:
            high = high + block(low)
        return self.last(high)


class GoesThroughChildren(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(8, 8, 1)
        self.second = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return F.interpolate(x, scale_factor=2)


class ThroughChildren(Base):
    def __init__(self):
        super().__init__()
        self.neck = GoesThroughChildren()

    def forward(self, image):
        high, low = self.both(image)
        return self.last(high + self.neck(low))


# -- one layer or line for several channel counts ----------------------------------------------------------------------


class SharedLayer(Base):
    """One nn.Upsample at three places, two of them with as many channels."""

    def __init__(self):
        super().__init__()
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.narrow = nn.Sequential(nn.Conv2d(8, 4, 1), self.up)

    def forward(self, image):
        high, low = self.both(image)
        x = high + self.up(low) + self.up(self.up(self.low(low)))
        return self.last(torch.cat([self.narrow(low), x[:, 4:] * 2], 1))


class OneLayer(Base):
    """One nn.Upsample at three levels, the last of them that of the logits, as saliency networks have it."""

    def __init__(self):
        super().__init__()
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)

    def forward(self, image):
        high, low = self.both(image)
        x = high + self.up(low + self.up(self.low(low)))
        return self.up(self.last(x))


class OneLayerInLoop(Base):
    """One nn.Upsample in a loop, called by its keyword."""

    def __init__(self):
        super().__init__()
        self.up = nn.Upsample(scale_factor=2)

    def forward(self, image):
        high, low = self.both(image)
        x = self.low(low)
        for skip in (low, high):
            x = skip + self.up(input=x)
        return self.last(x)


class LayerByForward(Base):
    """A layer whose forward is called, which runs no hooks."""

    def __init__(self):
        super().__init__()
        self.up = nn.Upsample(scale_factor=2)

    def forward(self, image):
        high, low = self.both(image)
        return self.last(high + self.up.forward(low + self.up.forward(self.low(low))))


class MadeLayers(Base):
    """Layers that the forward makes, or a function that it calls."""

    def forward(self, image):
        high, low = self.both(image)
        x = low + nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)(self.low(low))
        return self.last(high + nn.UpsamplingBilinear2d(size=high.shape[-2:])(x) + layer_for(2)(x))


def layer_for(scale):
    return nn.UpsamplingNearest2d(scale_factor=scale)


class ListedLayers(Base):
    """Layers in a plain list and a plain dict, which are no modules of the model."""

    def __init__(self):
        super().__init__()
        self.listed = [nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=2, mode="bilinear")]
        self.named = {"x4": nn.Upsample(scale_factor=4)}

    def forward(self, image):
        high, low = self.both(image)
        lower = self.low(low)
        for layer in self.listed:
            high = high + layer(low)
        return self.last(high + self.named["x4"](lower))


class MethodInComprehension(Base):
    """A method called from a comprehension, which is a function of its own in Python 3.11 and none in 3.12."""

    def enlarged(self, x, scale):
        return F.interpolate(x, scale_factor=scale)

    def forward(self, image):
        high, low = self.both(image)
        maps = [self.enlarged(x, scale) for x, scale in ((low, 2), (self.low(low), 4))]
        return self.last(high + maps[0] + maps[1])


class SharedBlock(Base):
    """A block without weights, for maps of any number of channels."""

    def __init__(self):
        super().__init__()
        self.block = Merge()
        self.narrow = nn.Conv2d(8, 4, 1)

    def forward(self, image):
        high, low = self.both(image)
        x = self.block(low, high)
        y = self.block(self.narrow(low), self.narrow(high))
        return self.last(x + torch.cat([y, y], 1))


class Merge(nn.Module):
    def forward(self, x, y):
        return F.interpolate(x, size=y.shape[2:]) + y


class EitherWay(Base):
    """One resize written twice, by a factor and, where that does not lead to the size of the skip, by a size."""

    def up(self, x, size=None):
        if size is None:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        else:
            x = F.interpolate(x, size=size, mode="nearest")
        return x

    def forward(self, image):
        high, low = self.both(image)
        even = image.shape[-1] % 2 == 0 and image.shape[-2] % 2 == 0
        x = high + self.up(low, None if even else high.shape[2:])
        return self.last(x + (F.interpolate(low, scale_factor=2) if even else F.interpolate(low, high.shape[2:])))


# -- train mode, varying counts, features in containers ----------------------------------------------------------------


class DeepSupervision(Base):
    """In train mode the deep map has a head of its own."""

    def __init__(self):
        super().__init__()
        self.deep = nn.Conv2d(8, 2, 1)

    def forward(self, image):
        high, low = self.both(image)
        out = self.last(high + F.interpolate(low, scale_factor=2))
        if self.training:
            return [out, self.deep(F.interpolate(self.low(low), size=low.shape[2:]))]
        return out


class TrainOnly(Base):
    """What has the resize in it only runs in train mode."""

    def __init__(self):
        super().__init__()
        self.merge = Merge()

    def forward(self, image):
        high, low = self.both(image)
        if self.training:
            high = self.merge(low, high)
        return self.last(high)


class UntilLarge(Base):
    """The number of runs follows the size of the image."""

    def forward(self, image):
        x = self.high(image)
        while x.shape[-1] > 8:
            x = self.low(x)
        while x.shape[-1] < image.shape[-1]:
            x = F.interpolate(x, scale_factor=2) * 0.9
        return self.last(F.adaptive_avg_pool2d(x, 4))


class Records(Base):
    """Features in an OrderedDict, a dict, a list and a tuple; sizes as plain ints."""

    def forward(self, image):
        high, low = self.both(image)
        maps = OrderedDict([("0", high), ("1", low), ("2", self.low(low))])
        height, width = maps["0"].shape[2], maps["0"].size(3)
        resized = {name: F.interpolate(x, size=(height, width)) for name, x in maps.items()}
        return {"out": self.last(sum(resized.values())), "maps": [*maps.values()]}


class KeywordsOnly(Base):
    def forward(self, *, image):
        high, low = self.both(image)
        return self.last(
            high + F.interpolate(low, size=int(high.shape[2]) if high.shape[2] == high.shape[3] else high.shape[2:])
        )


class Anisotropic(Base):
    def __init__(self):
        super().__init__()
        self.low = nn.Conv2d(8, 8, 3, stride=(2, 3), padding=1)
        self.up = nn.Upsample(scale_factor=(2, 3), mode="bilinear", align_corners=False)

    def forward(self, image):
        low = self.low(self.high(image))
        x = self.up(low) + F.interpolate(low, scale_factor=(2.0, 3.0))
        return self.last(F.interpolate(x, scale_factor=1.7, mode="bicubic"))


class FixedLayer(Base):
    """An nn.Upsample of a fixed size, one that rounds its size first, and one that a plain list holds too."""

    def __init__(self):
        super().__init__()
        self.fixed = nn.Upsample(size=(20, 20))
        self.rounds = nn.Upsample(scale_factor=1.7, mode="bilinear", recompute_scale_factor=True)
        self.listed = nn.Upsample(scale_factor=2)
        self.layers = [self.listed]

    def forward(self, image):
        high, low = self.both(image)
        x = self.fixed(self.rounds(F.adaptive_avg_pool2d(self.low(low), 7)))
        return self.last(high + self.layers[0](low)), self.last(x)

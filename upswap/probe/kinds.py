"""What a resize call is for, read off the flow of tensors around it."""

from __future__ import annotations

from collections.abc import Sequence

from .dataflow import COMPARISONS, PRODUCTS, Node

_CASTS = frozenset({
    "to", "float", "half", "bfloat16", "double", "type", "type_as", "unsqueeze", "squeeze", "view", "reshape",
    "expand", "permute", "transpose", "__getitem__", "contiguous", "detach", "clone", "repeat",
})  # fmt: skip
_SIGMOIDS = frozenset({
    "sigmoid", "sigmoid_", "hardsigmoid",
})  # fmt: skip
#: No more channels than those of depth and flow; a small pyramid may have as many in all its levels as a picture has.
_FEW = 2
#: The modes a learned sampler has an equal of. Antialias changes what a smaller target is, and bicubic's kernel.
MODES = ("nearest", "nearest-exact", "bilinear", "bicubic", "area")


def kind_of(
    node: Node,
    in_shape: tuple[int, ...],
    out_shape: tuple[int, ...],
    mode: str,
    *,
    antialias: bool,
    outputs: Sequence[Node],
    without_gradients: bool,
) -> tuple[str, str]:
    """The kind of one resize call and the reason for it.

    `node` is the call in the recorded flow, `outputs` is what the model returned; the shapes are (N, C, H, W) for an
    image-like tensor. What the result is used for comes before its size, which is another at every input size. A table
    written as code: the first rule that fits.
    """
    if not node.from_input:
        return "parameter", "nothing of the model's input flows into it"
    if len(in_shape) == 3:
        return "sequence", "resizes a 3-D tensor"
    if len(in_shape) == 5:
        return "volume", "resizes a 5-D tensor: not yet supported"
    if _is_mask(node):
        return "mask", "an integer or boolean tensor, or consumed by a comparison"
    if not node.learned:
        return "image", "comes from the input with no learned operation between"
    if not node.users and not any(output is node for output in outputs):
        return "other", "its result is not used"
    if not any(later.mixes() for later in node.downstream()):
        return "logits", "reaches the output with no convolution, linear or norm after it"
    prediction = _is_prediction(node, outputs)
    if prediction is not None:
        return "logits", prediction
    if node.users and all(_gates(user, node) for user in node.users):
        return "gate", "every consumer is a multiplication or a sigmoid"
    if without_gradients:
        return "other", "made where the model has turned gradients off: nothing could be learned"
    old, new = in_shape[-2:], out_shape[-2:]
    if old == (1, 1) and new != (1, 1) and node.inputs and node.inputs[0].is_pooled():
        return "context", "its source is a single point"
    if new == old:
        return "identity", f"the output has the size of the input, {old[0]}x{old[1]}"
    if new[0] < old[0] or new[1] < old[1]:
        return "downsample", f"goes down from {old[0]}x{old[1]} to {new[0]}x{new[1]}"
    if antialias or mode not in MODES:
        return "other", f"mode {mode!r}{' with antialias' if antialias else ''} has no sampling equivalent"
    return "feature", "a learned feature map, made larger"


def _is_prediction(node: Node, outputs: Sequence[Node]) -> str | None:
    """Why a map that layers go on with is an output of the model all the same, such as the side outputs that a last
    convolution fuses; None for a feature map."""
    if _is_returned(node, outputs):
        return "reaches an output as it is"
    siblings = node.inputs[0].users if node.inputs else []
    if any(sibling.name == "interpolate" and _is_returned(sibling, outputs) for sibling in siblings):
        return "its source reaches an output as it is, resized"
    channels = {output.shape[1] for output in outputs if len(output.shape) == 4}
    if len(node.shape) == 4 and node.shape[1] in channels and node.shape[1] <= _FEW and _is_narrowed(node):
        return f"it has the {node.shape[1]} channel(s) of an output, an estimate that is refined"
    return None


def _is_narrowed(node: Node) -> bool:
    """Whether the layer that made a map took more channels than it gave, as one that estimates does."""
    queue = list(node.inputs)
    for source in queue:
        if source.mixes():
            if any(
                len(taken.shape) == 4 and taken.from_input and taken.shape[1] > node.shape[1] for taken in source.inputs
            ):
                return True
        else:
            queue += [other for other in source.inputs if not any(known is other for known in queue)]
    return False


def _is_returned(node: Node, outputs: Sequence[Node]) -> bool:
    """Whether a map reaches an output with nothing but functions of its own values after it."""
    queue = [node]
    for current in queue:
        if any(output is current for output in outputs):
            return True
        queue += [
            user
            for user in current.users
            if not (user.mixes() or user.reduces or user.name in COMPARISONS)
            and all(other is current or not (other.from_input or other.parametric) for other in user.inputs)
            and not any(known is user for known in queue)
        ]
    return False


def _gates(user: Node, node: Node) -> bool:
    """Whether a consumer makes the resized values weights of another map; a product with a number or a parameter does not."""
    if user.name in _SIGMOIDS:
        return True
    others = [other for other in user.inputs if other is not node and other.from_input]
    # A product with a sigmoid: the other one is the gate, and this one the feature.
    return user.name in PRODUCTS and bool(others) and not any(_is_weight(other) for other in others)


def _is_weight(node: Node) -> bool:
    """Whether values lie between 0 and 1 by the function that made them."""
    while node.name in _CASTS and node.inputs:
        node = node.inputs[0]
    return node.name in _SIGMOIDS or node.name in ("softmax", "softmax_", "tanh", "hardsigmoid_")


def _is_mask(node: Node) -> bool:
    """Whether the resized values are labels or a mask rather than features."""
    if node.users and all(user.name in COMPARISONS or user.name == "topk" for user in node.users):
        return True
    source = node.inputs[0] if node.inputs else None
    while source is not None:
        if source.integral:
            return True
        source = source.inputs[0] if source.name in _CASTS and source.inputs else None
    return False

"""The kind of a resize call from the functions around it: every rule, its words, and which rule comes first."""

from __future__ import annotations

import pytest

from upswap.probe.dataflow import Node
from upswap.probe.kinds import MODES, kind_of

SMALL, LARGE = (1, 8, 4, 6), (1, 8, 8, 12)
CASTS = [
    *("to", "float", "half", "bfloat16", "double", "type", "type_as", "unsqueeze", "squeeze", "view", "reshape"),
    *("expand", "permute", "transpose", "__getitem__", "contiguous", "detach", "clone", "repeat"),
]
SIGMOIDS = ["sigmoid", "sigmoid_", "hardsigmoid"]
PRODUCTS = ["mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"]


def image(channels=3):
    return Node("input", [], "input", shape=(1, channels, *SMALL[2:]))


def weight(shape=(8, 8, 3, 3), source="parameter"):
    return Node(source, [], source, shape=shape)


def conv(*inputs):
    return Node("conv2d", [*inputs, weight()])


def resize(source=None):
    """A resize, mostly of a learned map."""
    return Node("interpolate", [source if source is not None else conv(image())])


def kind(node, in_shape=SMALL, out_shape=LARGE, mode="bilinear", antialias=False, outputs=(), without_gradients=False):
    return kind_of(
        node,
        in_shape,
        out_shape,
        mode,
        antialias=antialias,
        outputs=outputs,
        without_gradients=without_gradients,
    )


def used_by(*names, source=None):
    """A resize whose result goes into functions of these names, and from each into a convolution."""
    node = resize(source)
    for name in names:
        conv(Node(name, [node]))
    return node


FEATURE = ("feature", "a learned feature map, made larger")
MASK = ("mask", "an integer or boolean tensor, or consumed by a comparison")
IMAGE = ("image", "comes from the input with no learned operation between")
GATE = ("gate", "every consumer is a multiplication or a sigmoid")
LOGITS = ("logits", "reaches the output with no convolution, linear or norm after it")


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "bicubic", "area"])
def test_feature(mode) -> None:
    assert mode in MODES
    assert kind(used_by("relu"), mode=mode) == FEATURE


def test_feature_where_one_axis_stays() -> None:
    assert kind(used_by("relu"), SMALL, (1, 8, 8, 6)) == FEATURE
    assert kind(used_by("relu"), SMALL, (1, 8, 4, 7)) == FEATURE


def test_parameter_comes_before_the_number_of_axes() -> None:
    node = resize(Node("view", [weight()]))
    conv(node)
    assert kind(node) == ("parameter", "nothing of the model's input flows into it")
    assert kind(node, (1, 8, 4), (1, 8, 8))[0] == "parameter"


def test_three_and_five_axes_come_before_masks() -> None:
    node = used_by("argmax")
    assert kind(node, (1, 8, 4), (1, 8, 8)) == ("sequence", "resizes a 3-D tensor")
    assert kind(node, (1, 8, 4, 4, 4), (1, 8, 8, 8, 8)) == ("volume", "resizes a 5-D tensor: not yet supported")
    assert kind(node) == MASK


@pytest.mark.parametrize("name", ["__gt__", "le", "argmax", "bool", "long", "topk"])
def test_mask_by_its_consumers(name) -> None:
    assert kind(used_by(name)) == MASK
    assert kind(used_by(name, "argmin")) == MASK
    assert kind(used_by(name, "relu")) == FEATURE


def test_mask_of_integers() -> None:
    node = resize(Node("argmax", [conv(image())], integral=True))
    conv(node)
    assert kind(node) == MASK


@pytest.mark.parametrize("name", CASTS)
def test_mask_of_integers_through_casts_and_views(name) -> None:
    labels = Node("argmax", [conv(image())], integral=True)
    node = resize(Node("float", [Node(name, [labels])]))
    conv(node)
    assert kind(node) == MASK


@pytest.mark.parametrize("name", ["embedding", "mul", "softmax", "one_hot"])
def test_no_mask_where_something_is_computed_from_the_integers(name) -> None:
    labels = Node("argmax", [conv(image())], integral=True)
    node = resize(Node(name, [labels]))
    conv(node)
    assert kind(node) == FEATURE


def test_a_cast_of_nothing_recorded_is_no_mask() -> None:
    node = resize(Node("view", [], "unknown"))
    conv(node)
    assert kind(node) == FEATURE
    alone = Node("interpolate", [], "unknown")
    conv(alone)
    assert kind(alone) == FEATURE


def test_image_comes_before_unused_results() -> None:
    node = resize(image())
    assert kind(node) == IMAGE
    conv(node)
    assert kind(node) == IMAGE
    normalised = resize(Node("mul", [image(), weight()]))
    assert kind(normalised) == IMAGE


def test_unused_results() -> None:
    assert kind(resize()) == ("other", "its result is not used")
    node = resize()
    assert kind(node, outputs=[node]) == LOGITS
    assert kind(node, outputs=[resize()]) == ("other", "its result is not used")


def test_logits_before_gates() -> None:
    node = resize()
    Node("sigmoid", [node])
    assert kind(node) == LOGITS
    assert kind(node, SMALL, SMALL) == LOGITS  # and before what its size says
    assert kind(node, without_gradients=True) == LOGITS


@pytest.mark.parametrize("name", ["conv2d", "linear", "layer_norm", "matmul"])
def test_no_logits_with_something_learned_anywhere_after(name) -> None:
    node = resize()
    Node(name, [Node("relu", [node])])
    assert kind(node) == FEATURE


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_learned_gain_for_each_channel_is_a_norm(name) -> None:
    for shape in ((8,), (8, 1, 1), (1, 8, 1, 1)):
        node = resize()
        Node("add", [Node(name, [weight(shape), node]), weight(shape)])
        assert kind(node) == FEATURE


def test_what_is_no_learned_gain() -> None:
    for factor in (weight((1,)), weight(()), weight((8, 4, 6)), weight((1, 3, 1, 1), "buffer"), conv(image())):
        node = resize()
        Node("mul", [node, factor])
        assert kind(node) == LOGITS
    node = resize()
    Node("add", [node, weight((8,))])
    assert kind(node) == LOGITS


RETURNED = ("logits", "reaches an output as it is")


@pytest.mark.parametrize("names", [(), ("sigmoid",), ("squeeze", "clamp", "softmax"), ("mul",)])
def test_side_outputs_that_a_convolution_fuses_are_logits(names) -> None:
    node = resize()
    conv(Node("cat", [node, conv(image())]))
    output = node
    for name in names:
        output = Node(name, [output])
    assert kind(node, outputs=[output]) == RETURNED
    assert kind(node, outputs=[conv(image())]) == FEATURE


@pytest.mark.parametrize(
    "joined",
    [
        lambda node: Node("add", [node, conv(image())]),  # another map
        lambda node: Node("mul", [node, weight((1,))]),
        lambda node: Node("conv2d", [node]),
        lambda node: Node("mean", [node], reduces=True),
        lambda node: Node("argmax", [node]),
    ],
)
def test_an_output_that_more_than_the_map_goes_into_says_nothing_of_it(joined) -> None:
    node = resize()
    conv(node)
    assert kind(node, outputs=[joined(node)]) == FEATURE


def test_a_map_whose_source_is_returned_at_another_size_is_an_estimate() -> None:
    source = conv(image())
    node, returned = resize(source), resize(source)
    conv(Node("add", [node, conv(image())]))
    assert kind(node, outputs=[returned]) == ("logits", "its source reaches an output as it is, resized")
    assert kind(node, outputs=[source]) == FEATURE  # the levels of a pyramid are returned like this


def test_as_many_channels_as_the_output_has() -> None:
    for channels, reason in ((1, "1 channel(s)"), (2, "2 channel(s)")):
        wide = conv(image())
        wide.shape = (1, channels + 1, 4, 6)
        node = resize(Node("add", [conv(wide), conv(wide)]))
        node.shape = (1, channels, 8, 12)
        output = conv(node)
        output.shape = (1, channels, 16, 24)
        assert kind(node, outputs=[output]) == (
            "logits",
            f"it has the {reason} of an output, an estimate that is refined",
        )
        output.shape = (1, channels + 1, 16, 24)
        assert kind(node, outputs=[output]) == FEATURE
        output.shape = (1, channels)
        assert kind(node, outputs=[output]) == FEATURE
    node = resize(conv(wide))
    output = conv(node)
    node.shape = output.shape = (1, 3, 8, 12)  # features may have as many
    wide.shape = (1, 6, 4, 6)
    assert kind(node, outputs=[output]) == FEATURE
    node = resize(conv(image(2)))
    output = conv(node)
    node.shape = output.shape = (1, 2, 8, 12)  # and what no layer made narrower is no estimate
    assert kind(node, outputs=[output]) == FEATURE


def test_a_decoders_input_is_a_map_and_no_image() -> None:
    for channels, expected in ((3, IMAGE), (32, IMAGE), (33, FEATURE), (3072, FEATURE)):
        node = resize(image(channels))
        conv(node)
        assert kind(node) == expected


@pytest.mark.parametrize("name", SIGMOIDS)
def test_gate_by_a_sigmoid(name) -> None:
    assert kind(used_by(name)) == GATE
    assert kind(used_by(name, name)) == GATE
    assert kind(used_by(name, "relu")) == FEATURE


@pytest.mark.parametrize("name", ["tanh", "softmax", "relu"])
def test_no_gate_by_other_activations(name) -> None:
    assert kind(used_by(name)) == FEATURE


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("first", [True, False])
def test_gate_by_a_product_with_another_map(name, first) -> None:
    node, other = resize(), conv(image())
    conv(Node(name, [node, other] if first else [other, node]))
    assert kind(node) == GATE


@pytest.mark.parametrize("name", ["add", "__add__", "cat", "div"])
def test_no_gate_by_other_ways_to_join_maps(name) -> None:
    node = resize()
    conv(Node(name, [node, conv(image())]))
    assert kind(node) == FEATURE


@pytest.mark.parametrize("name", PRODUCTS)
def test_no_gate_by_a_product_with_a_number_a_parameter_or_itself(name) -> None:
    assert kind(used_by(name)) == FEATURE
    node = resize()
    conv(Node(name, [node, weight()]))
    assert kind(node) == FEATURE
    node = resize()
    conv(Node(name, [node, node]))
    assert kind(node) == FEATURE


@pytest.mark.parametrize("gate", [*SIGMOIDS, "softmax", "softmax_", "tanh", "hardsigmoid_"])
def test_what_a_gate_is_multiplied_with_is_the_feature(gate) -> None:
    node = resize()
    conv(Node("mul", [node, Node(gate, [conv(image())])]))
    assert kind(node) == FEATURE


@pytest.mark.parametrize("name", CASTS)
def test_a_gate_is_one_through_casts_and_views(name) -> None:
    node = resize()
    gate = Node("view", [Node(name, [Node("sigmoid", [conv(image())])])])
    conv(Node("mul", [node, gate]))
    assert kind(node) == FEATURE


@pytest.mark.parametrize("name", ["relu", "mean", "softplus"])
def test_a_gate_is_none_any_more_after_something_is_computed_from_it(name) -> None:
    node = resize()
    conv(Node("mul", [node, Node(name, [Node("sigmoid", [conv(image())])])]))
    assert kind(node) == GATE


def test_a_view_of_nothing_recorded_is_no_gate() -> None:
    node = resize()
    conv(Node("mul", [node, Node("view", [], "unknown")]))
    assert kind(node) == GATE


def test_one_gate_among_the_factors_is_enough_to_be_the_feature() -> None:
    node = resize()
    conv(Node("mul", [node, conv(image()), Node("sigmoid", [conv(image())])]))
    assert kind(node) == FEATURE


def test_gates_before_missing_gradients() -> None:
    without = ("other", "made where the model has turned gradients off: nothing could be learned")
    assert kind(used_by("sigmoid"), without_gradients=True) == GATE
    assert kind(used_by("relu"), without_gradients=True) == without
    assert kind(used_by("relu"), SMALL, SMALL, without_gradients=True) == without


def pooled():
    return Node("adaptive_avg_pool2d", [conv(image())], shape=(1, 8, 1, 1))


def test_context() -> None:
    point = (1, 8, 1, 1)
    assert kind(used_by("relu", source=pooled()), point, LARGE) == ("context", "its source is a single point")
    assert kind(used_by("relu", source=pooled()), point, (1, 8, 1, 2))[0] == "context"
    assert kind(used_by("relu", source=pooled()), point, LARGE, "trilinear")[0] == "context"


def test_no_context_without_a_pooling_or_a_point_or_a_larger_target() -> None:
    point = (1, 8, 1, 1)
    assert kind(used_by("relu"), point, LARGE) == FEATURE
    assert kind(used_by("relu", source=pooled()), (1, 8, 1, 2), LARGE) == FEATURE
    assert kind(used_by("relu", source=pooled()), point, point) == (
        "identity",
        "the output has the size of the input, 1x1",
    )
    alone = Node("interpolate", [], "unknown")
    conv(alone)
    assert kind(alone, point, LARGE) == FEATURE


def test_identity_and_downsample_say_the_sizes() -> None:
    node = used_by("relu")
    assert kind(node, SMALL, SMALL) == ("identity", "the output has the size of the input, 4x6")
    assert kind(node, LARGE, SMALL) == ("downsample", "goes down from 8x12 to 4x6")
    assert kind(node, SMALL, (1, 8, 3, 12)) == ("downsample", "goes down from 4x6 to 3x12")
    assert kind(node, SMALL, (1, 8, 8, 5)) == ("downsample", "goes down from 4x6 to 8x5")


def test_sizes_before_modes() -> None:
    node = used_by("relu")
    assert kind(node, LARGE, SMALL, "trilinear", antialias=True)[0] == "downsample"
    assert kind(node, mode="trilinear") == ("other", "mode 'trilinear' has no sampling equivalent")
    assert kind(node, antialias=True) == ("other", "mode 'bilinear' with antialias has no sampling equivalent")

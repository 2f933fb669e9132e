"""The MACs of every operator compared with a closed form, and the parameter that they are attributed to."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.layers import CondConv2d, ScaledStdConv2dSame, StdConv2d
from torch import Tensor, nn

from nestify.schedule.costs import count_macs, effective_macs


class Function(nn.Module):
    """A model that is a function of itself and the image (1, c, h, w), with given parameters and modules."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(part))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def recurrent(layer: nn.RNNBase) -> Function:
    """Return a model with a recurrent layer that reads each row of the image as one sequence."""
    return Function(lambda self, x: self.rnn(x.flatten(0, 1))[0], rnn=layer)


def heads(x: Tensor, features: int) -> Tensor:
    return x[..., :features]


# Sizes are (channels, height, width); each expected count is written as positions x outputs x inputs.
CLOSED_FORMS = {
    "convolution": (nn.Conv2d(3, 8, 3, stride=2, padding=1), (3, 9, 9), (5 * 5) * 8 * (3 * 9)),
    "convolution, 1-d": (
        Function(lambda self, x: self.conv(x.flatten(2)), conv=nn.Conv1d(3, 4, 5)),
        (3, 2, 6),
        8 * 4 * (3 * 5),
    ),
    "depthwise": (nn.Conv2d(8, 8, 3, padding=1, groups=8), (8, 6, 6), (6 * 6) * 8 * 9),
    "groups": (nn.Conv2d(8, 12, 1, groups=4), (8, 5, 5), (5 * 5) * 12 * 2),
    "dilated": (nn.Conv2d(2, 3, 3, dilation=2), (2, 7, 7), (3 * 3) * 3 * (2 * 9)),
    "padding by name": (nn.Conv2d(4, 6, 5, padding="same"), (4, 7, 7), (7 * 7) * 6 * (4 * 25)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), (4, 5, 5), (5 * 5) * 4 * (6 * 9)),
    "transposed, groups": (nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 5, 5), (5 * 5) * 4 * (3 * 9)),
    "linear": (nn.Linear(10, 7), (3, 4, 10), (3 * 4) * 7 * 10),
    "linear, no bias": (nn.Linear(10, 7, bias=False), (3, 4, 10), (3 * 4) * 7 * 10),
    # four gates, two directions; the second layer reads the outputs of both directions
    "lstm": (
        recurrent(nn.LSTM(5, 6, num_layers=2, bidirectional=True, batch_first=True)),
        (2, 7, 5),
        (2 * 7) * 2 * (4 * 6 * (5 + 6) + 4 * 6 * (12 + 6)),
    ),
    # the hidden state of 6 is projected to 3
    "lstm, projected": (
        recurrent(nn.LSTM(5, 6, proj_size=3)),
        (2, 7, 5),
        (2 * 7) * (4 * 6 * (5 + 3) + 3 * 6),
    ),
    "gru": (recurrent(nn.GRU(5, 6)), (2, 7, 5), (2 * 7) * 3 * 6 * (5 + 6)),
    "rnn": (recurrent(nn.RNN(5, 6, bias=False)), (2, 7, 5), (2 * 7) * 6 * (5 + 6)),
    "rnn, relu": (recurrent(nn.RNN(5, 6, nonlinearity="relu")), (2, 7, 5), (2 * 7) * 6 * (5 + 6)),
    # 2 heads, 5 queries of 4 features, 5 keys of 4, values of 3
    "attention": (
        Function(lambda self, x: F.scaled_dot_product_attention(x, x, heads(x, 3))),
        (2, 5, 4),
        2 * (5 * 5) * (4 + 3),
    ),
    "attention, causal": (
        Function(lambda self, x: F.scaled_dot_product_attention(x, x, x, is_causal=True)),
        (2, 5, 4),
        2 * (5 * 5) * (4 + 4),
    ),
    # 4 heads of queries share 2 heads of keys and values
    "attention, grouped": (
        Function(lambda self, x: F.scaled_dot_product_attention(x, x[:, :2], x[:, :2], enable_gqa=True)),
        (4, 5, 4),
        4 * (5 * 5) * (4 + 4),
    ),
    "attention, 3 keys": (
        Function(lambda self, x: F.scaled_dot_product_attention(x, x[:, :, :3], x[:, :, :3])),
        (2, 5, 4),
        2 * (5 * 3) * (4 + 4),
    ),
    "matmul": (Function(lambda self, x: x @ x.transpose(-2, -1)), (3, 4, 5), 3 * (4 * 4) * 5),
    "matmul, broadcast": (
        Function(lambda self, x: self.left @ x, left=torch.ones(7, 4)),
        (3, 4, 5),
        3 * (7 * 5) * 4,
    ),
    "mm": (Function(lambda self, x: torch.mm(x[0, 0], x[0, 0].t())), (3, 4, 5), (4 * 4) * 5),
    "bmm": (Function(lambda self, x: torch.bmm(x[0], x[0].mT)), (3, 4, 5), 3 * (4 * 4) * 5),
    "mv": (Function(lambda self, x: torch.mv(x[0, 0], x[0, 0, 0])), (3, 4, 5), 4 * 5),
    "dot": (Function(lambda self, x: torch.dot(x[0, 0, 0], x[0, 0, 1])), (3, 4, 5), 5),
    "addmm": (Function(lambda self, x: torch.addmm(x[0, 0], x[0, 0], x[0, 1])), (2, 4, 4), (4 * 4) * 4),
    "addmv": (Function(lambda self, x: torch.addmv(x[0, 0, 0], x[0, 0], x[0, 0, 1])), (2, 4, 4), 4 * 4),
    "baddbmm": (Function(lambda self, x: torch.baddbmm(x[0], x[0], x[0])), (2, 4, 4), 2 * (4 * 4) * 4),
    "einsum": (
        Function(lambda self, x: torch.einsum("bhwc,hkc->bhwk", x, self.table), table=torch.ones(3, 6, 5)),
        (3, 4, 5),
        (3 * 4 * 6) * 5,
    ),
    "einsum, two sums": (
        Function(lambda self, x: torch.einsum("bcij,kcij->bk", x, self.table), table=torch.ones(6, 2, 3, 4)),
        (2, 3, 4),
        6 * (2 * 3 * 4),
    ),
}


@pytest.mark.parametrize(("model", "input_size", "macs"), CLOSED_FORMS.values(), ids=CLOSED_FORMS)
def test_counts_the_closed_form(model, input_size, macs):
    count = count_macs(model, input_size)
    assert count.total == macs
    assert not count.uncounted


@pytest.mark.parametrize(
    "model",
    [
        nn.BatchNorm2d(4),
        nn.InstanceNorm2d(4, affine=True),
        nn.GroupNorm(2, 4),
        nn.LayerNorm([4, 6, 6]),
        nn.RMSNorm([6]),
        nn.Softmax(dim=1),
        nn.GELU(),
        nn.Hardswish(inplace=True),
        nn.Dropout(0.5),
        nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.MaxPool2d(2),
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Upsample(scale_factor=2, mode="bicubic"),
        nn.Upsample(scale_factor=2, mode="nearest-exact"),
        Function(lambda _, x: F.interpolate(x, 3, mode="bicubic", antialias=True)),
        nn.PixelShuffle(2),
        nn.Unfold(3),
        Function(lambda _, x: F.grid_sample(x, torch.zeros(1, 2, 2, 2), align_corners=False)),
        Function(lambda _, x: (x * x).sum(dim=1) / x.square().mean()),
    ],
    ids=str,
)
def test_operators_without_macs_are_known(model):
    count = count_macs(model, (4, 6, 6))
    assert count.total == 0
    assert not count.uncounted


def test_an_unknown_operator_is_named_and_counted():
    model = Function(lambda self, x: self.fc(torch.fft.fft2(torch.fft.fft2(x)).abs()), fc=nn.Linear(4, 3))
    count = count_macs(model, (2, 5, 4))
    assert dict(count.uncounted) == {"aten::fft_fft2": 2}
    assert count.total == (2 * 5) * (3 * 4)


class TestWhichWeight:
    def test_by_state_dict_name_with_biases_at_zero(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))
        count = count_macs(model, (3, 4, 4))
        assert dict(count.by_weight) == {
            "0.weight": (2 * 2) * 4 * 27,
            "0.bias": 0,
            "1.weight": 0,
            "1.bias": 0,
            "3.weight": 5 * 16,
            "3.bias": 0,
        }
        assert not count.not_skippable

    @pytest.mark.parametrize(
        "function",
        [
            lambda self, x: F.linear(x, self.child.weight),
            lambda self, x: F.linear(x, self.child.weight.double().float()),
            lambda self, x: x @ self.child.weight.t(),
            lambda self, x: (self.child.weight @ x.mT).mT,
            lambda self, x: torch.einsum("bchi,oi->bcho", x, self.child.weight),
            lambda self, x: F.conv2d(x.mT, self.child.weight.view(6, 4, 1, 1).expand(6, 4, 1, 1).clone()),
            lambda self, x: torch.cat([F.linear(x, part) for part in self.child.weight.chunk(2)], dim=-1),
        ],
    )
    def test_a_rearranged_weight_is_found(self, function):
        model = Function(function, child=nn.Linear(4, 6))
        count = count_macs(model, (4, 4, 4))
        assert dict(count.by_weight) == {"child.weight": 16 * 24, "child.bias": 0}
        assert count.total == 16 * 24
        assert not count.not_skippable

    def test_weights_of_recurrent_layers(self):
        count = count_macs(recurrent(nn.LSTM(5, 6)), (2, 7, 5))
        steps = 2 * 7
        assert {name: macs for name, macs in count.by_weight.items() if macs} == {
            "rnn.weight_ih_l0": steps * 24 * 5,
            "rnn.weight_hh_l0": steps * 24 * 6,
        }

    def test_all_uses_of_a_shared_weight_count_for_its_first_name(self):
        layer = nn.Linear(4, 4)
        count = count_macs(nn.Sequential(layer, nn.ReLU(), layer), (1, 3, 4))
        assert dict(count.by_weight) == {"0.weight": 2 * 3 * 16, "0.bias": 0}

    def test_products_with_constants_and_of_two_activations_have_no_weight(self):
        blur = Function(lambda self, x: F.conv2d(x, self.kernel, padding=1, groups=4) @ x)
        blur.register_buffer("kernel", torch.ones(4, 1, 3, 3))
        count = count_macs(nn.Sequential(blur, nn.Conv2d(4, 3, 1)), (4, 3, 3))
        assert count.by_weight["1.weight"] == 9 * 12
        assert count.total == 9 * 12 + (9 * 4) * 9 + 4 * 9 * 3

    @pytest.mark.parametrize(
        "function",
        [
            lambda self, x: F.relu(self.fc(self.queries)) @ x.mT,
            lambda self, x: F.linear(x, self.fc(self.queries)),  # even as the argument `weight`
        ],
    )
    def test_activations_of_learned_queries_are_not_a_weight(self, function):
        count = count_macs(Function(function, fc=nn.Linear(4, 4), queries=torch.ones(2, 4)), (1, 3, 4))
        assert dict(count.by_weight) == {"queries": 0, "fc.weight": 2 * 16, "fc.bias": 0}
        assert count.total == 2 * 16 + (2 * 3) * 4

    def test_normalised_queries_are_not_a_weight(self):
        model = Function(lambda self, x: F.normalize(self.queries, dim=1) @ x.mT, queries=torch.ones(2, 4))
        count = count_macs(model, (1, 3, 4))
        assert dict(count.by_weight) == {"queries": 0}
        assert not count.not_skippable

    def test_mixed_experts_have_only_the_macs_of_mixing(self):
        """In a CondConv the mixture depends on the image, so the convolution multiplies with no parameter."""
        model = Function(
            lambda self, x: self.conv(x, torch.sigmoid(self.route(x.mean((2, 3))))),
            conv=CondConv2d(3, 4, 3, padding=0, num_experts=2),
            route=nn.Linear(3, 2),
        )
        count = count_macs(model, (3, 5, 5))
        assert count.by_weight["conv.weight"] == 2 * 108
        assert count.by_weight["route.weight"] == 2 * 3
        assert count.total == 9 * 108 + 2 * 108 + 2 * 3


class TestNotSkippable:
    @pytest.mark.parametrize("layer", [StdConv2d(3, 4, 3), ScaledStdConv2dSame(3, 4, 3)])
    def test_standardised_weights(self, layer):
        count = count_macs(nn.Sequential(layer, nn.Conv2d(4, 2, 1)), (3, 5, 5))
        assert count.not_skippable == {"0.weight"}
        assert count.by_weight["0.weight"] > 0
        assert effective_macs(count, {"0.weight": 0.25}) == count.total
        assert effective_macs(count, {"1.weight": 0.25}) < count.total

    def test_a_weight_minus_its_mean(self):
        model = Function(
            lambda self, x: F.linear(x, self.weight - self.weight.mean()), weight=torch.rand(3, 4)
        )
        count = count_macs(model, (1, 2, 4))
        assert count.not_skippable == {"weight"}
        assert count.by_weight["weight"] == 2 * 12

    def test_one_of_two_uses_is_enough(self):
        model = Function(
            lambda self, x: F.linear(F.linear(x, self.weight), self.weight + 1), weight=torch.rand(4, 4)
        )
        count = count_macs(model, (1, 2, 4))
        assert count.not_skippable == {"weight"}
        assert count.by_weight["weight"] == 2 * (2 * 16)

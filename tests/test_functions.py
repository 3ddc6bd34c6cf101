"""Functions replaced as they are called, whatever form they have, and the operations a model is made of."""

import pytest
import torch
from torch import nn

from torchserve_explain.attribution.functions import operations, replacing, surrogate
from torchserve_explain.attribution.methods.full_gradient import BiasGradients
from torchserve_explain.attribution.methods.lrp import Composite, RelevanceRules
from torchserve_explain.errors import Unsupported


def doubled(call):
    return 2 * call.run(call.args[0])


class Forms(nn.Module):
    """The same ReLU as a module, reused, in place, and as every kind of function."""

    def __init__(self):
        super().__init__()
        self.module, self.in_place = nn.ReLU(), nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.module(x)
        x = self.module(x)
        self.in_place(x := x.clone())  # its answer is not looked at
        x = nn.functional.relu(x.relu())
        return torch.relu(x.relu_())


def test_every_form_of_a_function_is_replaced_once():
    x = torch.tensor([-1.0, 3.0], requires_grad=True)
    model = Forms()
    out = replacing(model, lambda: {"relu": doubled})(x)
    assert out.tolist() == [0, 3 * 2**7]
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient.tolist() == [0, 2**7]
    assert model(x).tolist() == [0, 3]  # the model itself is as it was


def test_what_does_not_depend_on_the_image_is_left_alone():
    class Net(nn.Module):
        def forward(self, x):
            return x + torch.relu(torch.ones(2))

    x = torch.zeros(2, requires_grad=True)
    assert replacing(Net(), lambda: {"relu": doubled})(x).tolist() == [1, 1]


def test_an_input_given_by_name_is_refused_where_a_rule_would_miss_it():
    class Net(nn.Module):
        def forward(self, x):
            return torch.relu(input=x)

    with pytest.raises(Unsupported, match="by name"):
        replacing(Net(), lambda: {"relu": doubled})(torch.ones(2, requires_grad=True))


def test_replacements_are_made_anew_for_each_pass():
    made = []

    def replacements():
        made.append(1)
        return {}

    model = replacing(nn.ReLU(), replacements)
    model(torch.ones(1))
    model(torch.ones(1))
    assert len(made) == 2


def test_a_surrogate_has_the_value_of_one_and_the_gradient_of_the_other():
    x = torch.tensor([2.0], requires_grad=True)
    out = surrogate(torch.tensor([5.0]), 3 * x)
    assert out.item() == 5 and torch.autograd.grad(out.sum(), x)[0].item() == 3


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (lambda x: x.relu().mean(), {"Relu", "Mean"}),
        (lambda x: x * x.sigmoid(), {"Mul of two", "Sigmoid"}),
        (lambda x: 3 * x + 1, {"Mul", "Add"}),
        (lambda x: 1 / x, {"Reciprocal", "Mul"}),
        (lambda x: torch.ones(2) / x, {"Div by the image"}),
        (lambda x: torch.cat([x, x]), {"Cat"}),
        (lambda x: nn.functional.hardtanh(x), {"Hardtanh"}),
        (lambda x: torch.ones(2), set()),
    ],
)
def test_operations_are_named_as_autograd_has_them(body, expected):
    class Net(nn.Module):
        def forward(self, x):
            return body(x)

    assert operations(Net(), torch.ones(2)) - {"Clone"} == expected


class Complement(nn.Module):
    """A signal and one minus it, by Python's reflected operator, whose name ends as an in-place function's does."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(8, 2)

    def forward(self, x):
        y = self.layer(x.flatten(2).mean(2)).sigmoid()
        return self.head(torch.cat([1 - y, y], 1))


@pytest.mark.parametrize(
    "rule", [RelevanceRules(Composite.EPSILON_PLUS, (0,) * 3, (1,) * 3), BiasGradients(4, 4)], ids=["lrp", "full_grad"]
)
def test_a_reflected_operator_changes_nothing_in_place(rule):
    torch.manual_seed(0)
    model, x = Complement(), torch.rand(2, 3, 4, 4, requires_grad=True)
    out = rule.apply(model)(x)
    torch.testing.assert_close(out[0] if isinstance(out, tuple) else out, model(x))

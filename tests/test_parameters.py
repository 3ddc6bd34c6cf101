"""What a client may ask for: merged by precedence, checked against what is allowed, refused by name."""

import re
from dataclasses import fields
from enum import StrEnum
from math import inf, nan
from typing import Literal, get_args, get_origin

import pytest
from conftest import WITHOUT_ATTENTION
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchserve_explain.attribution.classifier import Classifier, Normalization
from torchserve_explain.attribution.methods import METHODS, Smoothing
from torchserve_explain.attribution.methods.cam import GradCam
from torchserve_explain.attribution.methods.smoothing import SmoothingKind
from torchserve_explain.attribution.quality import QUALITIES
from torchserve_explain.attribution.rows import Contrast, Score
from torchserve_explain.errors import RequestError
from torchserve_explain.serving.colormaps import COLORMAPS
from torchserve_explain.serving.parameters import (
    LONGEST_LIST,
    LONGEST_TEXT,
    OUTPUTS,
    PARAMETERS,
    Capabilities,
    Labels,
    read_parameters,
)


def kinds(name):
    """The types that a parameter's annotation is made of."""
    found, left = [], [PARAMETERS[name].annotation]
    while left:
        kind = left.pop()
        inner = () if get_origin(kind) is Literal else get_args(kind)
        left += inner
        found += [] if inner else [kind]
    return found


def choices(name):
    """The words that a parameter allows, or none where it is no choice."""
    words = [word for kind in kinds(name) if get_origin(kind) is Literal for word in get_args(kind)]
    words += [word.value for kind in kinds(name) if isinstance(kind, type) and issubclass(kind, StrEnum) for word in kind]
    return {"colormap": list(COLORMAPS), "output": list(OUTPUTS)}.get(name, words)


def bounds(name):
    """The bounds (ge, gt, le, lt) of a number."""
    return {b: getattr(item, b) for item in PARAMETERS[name].metadata for b in ("ge", "gt", "le", "lt") if hasattr(item, b)}


NUMBERS = [name for name in PARAMETERS if bounds(name)]
WHOLE = [name for name in NUMBERS if int in kinds(name)]
CHOICES = [name for name in PARAMETERS if choices(name)]
LISTS = ["method", "layer", "target"]


def within(name):
    """Values at a number's bounds, or just inside them."""
    step = 1 if name in WHOLE else 1e-9
    inside = {"ge": lambda v: v, "le": lambda v: v, "gt": lambda v: v + step, "lt": lambda v: v - step}
    return [inside[bound](value) for bound, value in bounds(name).items()]


def outside(name):
    """Values just beyond a number's bounds."""
    step = 1 if name in WHOLE else 1e-9
    beyond = {"ge": lambda v: v - step, "le": lambda v: v + step, "gt": lambda v: v, "lt": lambda v: v}
    return [beyond[bound](value) for bound, value in bounds(name).items()]


def pairs(names, values):
    return [pytest.param(name, value, id=f"{name}={value}") for name in names for value in values(name)]


def another(name):
    """A value that is no method's default."""
    if name in CHOICES:
        return choices(name)[-1]
    if name == "quality":
        return ["deletion", "infidelity"]
    if name in LISTS:
        return ["one", "two"]
    if name == "versus":
        return "rest"
    return True if name in ("values", "audit") else (7 if name in WHOLE else 0.125)


def as_sent(value):
    return list(value) if isinstance(value, tuple) else value


def refusal(*layers):
    with pytest.raises(RequestError) as caught:
        read_parameters(*layers)
    checked(caught.value)
    return str(caught.value)


def checked(error):
    assert error.status == 400
    assert str(error).isascii() and len(str(error)) <= 400


# Every parameter


def test_every_parameter_is_a_number_a_choice_a_list_or_a_truth():
    """So that the tests below leave none out."""
    assert PARAMETERS.keys() == {*NUMBERS, *CHOICES, *LISTS, "values", "audit", "quality", "versus"}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_default_is_allowed(name):
    default = PARAMETERS[name].default
    assert getattr(read_parameters({name: as_sent(default)}), name) == default


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_refusal_names_parameter_value_and_what_is_allowed(name):
    assert (
        refusal({name: {"no": "\u00e9"}})
        == f"{name}: {{'no': '\\xe9'}} is not allowed; allowed: {PARAMETERS[name].description}"
    )


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_long_value_is_shortened_in_a_refusal(name):
    message = refusal({name: {"no": "x" * 10_000}})
    assert "xxx..." in message and len(message) < 250


@pytest.mark.parametrize(("name", "value"), pairs(NUMBERS, within))
def test_a_number_within_its_bounds_is_allowed(name, value):
    assert getattr(read_parameters({name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), pairs(NUMBERS, within))
def test_a_number_may_be_text(name, value):
    assert getattr(read_parameters({name: str(value)}), name) == value


@pytest.mark.parametrize(("name", "value"), pairs(NUMBERS, outside))
def test_a_number_beyond_its_bounds_is_refused(name, value):
    assert refusal({name: value}) == f"{name}: {value!r} is not allowed; allowed: {PARAMETERS[name].description}"


CONTRACT = {
    "max_error": ([1e-6, 1], [0, 1.001]),
    "max_map_error": ([1e-6, 1], [0, 1.001]),
    "steps": ([1, 1000], [0, -1]),
    "samples": ([1, 1000], [0, -1]),
    "stdev": ([0, 0.5, 1], [-0.001, 1.001]),
    "gamma": ([0, 100], [-0.001, 100.001]),
    "seed": ([0, 2**63 - 1], [-1, 2**63]),
    "overlay": ([0, 1], [-0.001, 1.001]),
    "clip": ([0.001, 100], [0, 100.001]),
}


@pytest.mark.parametrize(("name", "value"), pairs(CONTRACT, lambda name: CONTRACT[name][0]))
def test_the_contract_allows(name, value):
    assert getattr(read_parameters({name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), pairs(CONTRACT, lambda name: CONTRACT[name][1]))
def test_the_contract_refuses(name, value):
    assert refusal({name: value}).startswith(f"{name}: {value!r} ")


@pytest.mark.parametrize("value", [nan, inf, -inf, "nan", "inf", True, False, "", "many", [1], "1;2", "9" * 5000, -(10**400)])
@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_usable_number_is_refused(name, value):
    assert refusal({name: value}).startswith(f"{name}: ")


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_number_beyond_64_bits_is_refused(name):
    assert refusal({name: 2**64}).startswith(f"{name}: ")


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [1.5, "1.5"])
def test_a_fraction_is_no_whole_number(name, value):
    assert refusal({name: value}).startswith(f"{name}: ")


@pytest.mark.parametrize(("name", "value"), pairs(CHOICES, choices))
def test_a_word_that_a_choice_offers_is_allowed(name, value):
    assert getattr(read_parameters({name: value}), name) == value


@pytest.mark.parametrize("name", CHOICES)
def test_a_refused_choice_lists_the_words_allowed(name):
    assert refusal({name: "none of them"}).endswith(f"allowed: one of {', '.join(choices(name))}")


@pytest.mark.parametrize(("name", "value"), pairs(CHOICES, lambda name: [choices(name)[0] + "x", choices(name)[0].upper(), ""]))
def test_a_choice_is_spelt_exactly(name, value):
    assert refusal({name: value}).startswith(f"{name}: {value!r} ")


@pytest.mark.parametrize(("value", "truth"), [(True, True), ("true", True), ("True", True), (False, False), ("false", False)])
def test_values_is_true_or_false(value, truth):
    assert read_parameters({"values": value}).values is truth


@pytest.mark.parametrize("value", ["", "maybe", 2, [True]])
def test_values_that_is_neither_true_nor_false_is_refused(value):
    assert refusal({"values": value}).endswith("allowed: true or false")


@pytest.mark.parametrize("name", ["stesp", "data", "Method", "method ", "", "\u00e9" * 100, "\ud800"])
def test_an_unknown_parameter_is_refused_with_those_allowed(name):
    message = refusal({name: 1})
    assert message.startswith("unknown parameter") and message.endswith(", ".join(PARAMETERS))


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(list(PARAMETERS)) | st.text(max_size=20),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=80),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
            max_leaves=5,
        ),
        max_size=3,
    )
)
def test_any_junk_is_read_or_refused(given):
    try:
        parameters = read_parameters(given)
    except RequestError as error:
        checked(error)
    else:
        assert parameters.model_fields_set == {name for name, value in given.items() if value is not None}


# Precedence


def test_nothing_given_is_the_default():
    assert read_parameters({}, {}) == read_parameters()


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_stronger_layer_wins(name):
    weak, strong = as_sent(PARAMETERS[name].default), another(name)
    assert read_parameters({name: weak}, {}, {name: strong}) == read_parameters({name: strong})


def test_layers_are_merged():
    parameters = read_parameters({"seed": 1}, {"method": "lime"}, {"output": "png"})
    assert (parameters.seed, parameters.method, parameters.output) == (1, ("lime",), "png")


@pytest.mark.parametrize("name", PARAMETERS)
def test_null_is_not_given(name):
    assert read_parameters({name: another(name)}, {name: None}) == read_parameters({name: another(name)})


def test_a_weaker_layers_value_is_not_checked_where_it_is_overruled():
    assert read_parameters({"seed": -1}, {"seed": 1}).seed == 1


def test_a_refused_value_of_a_weaker_layer_is_named():
    assert refusal({"seed": -1}, {"steps": 3}).startswith("seed: -1 ")


@pytest.mark.parametrize("name", ["max_error", "max_map_error"])
def test_a_stronger_error_takes_the_weaker_steps_away(name):
    parameters = read_parameters({"steps": 20}, {name: 0.1}).model_dump()
    assert (parameters["steps"], parameters[name]) == (None, 0.1)


def test_stronger_steps_stand_beside_a_weaker_max_error():
    assert read_parameters({"max_error": 0.1}, {"steps": 20}).model_dump()["steps"] == 20


def test_steps_and_max_error_of_one_layer_both_stand():
    parameters = read_parameters({}, {"steps": 20, "max_error": 0.1}).model_dump()
    assert (parameters["steps"], parameters["max_error"]) == (20, 0.1)


def test_a_max_error_of_null_leaves_the_steps():
    assert read_parameters({"steps": 20}, {"max_error": None}).model_dump()["steps"] == 20


def test_the_layers_given_are_left_as_they_were():
    weak, strong = {"steps": 20}, {"max_error": 0.1}
    read_parameters(weak, strong)
    assert (weak, strong) == ({"steps": 20}, {"max_error": 0.1})


# Lists


@pytest.mark.parametrize("name", ["method", "layer"])
@pytest.mark.parametrize(
    ("value", "items"),
    [("one", ("one",)), ("one,two", ("one", "two")), (" one , two ", ("one", "two")), (["one", "two"], ("one", "two"))],
)
def test_a_list_is_comma_text_or_a_json_array(name, value, items):
    assert getattr(read_parameters({name: value}), name) == items


@pytest.mark.parametrize("name", ["method", "layer"])
def test_the_items_of_a_json_array_are_not_split(name):
    assert getattr(read_parameters({name: ["a,b", "c"]}), name) == ("a,b", "c")


@pytest.mark.parametrize("name", LISTS)
def test_an_empty_json_array_is_refused(name):
    assert refusal({name: []}).startswith(f"{name}: [] ")


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("value", [[None], [["a"]], [{}], {"a": 1}, 1.5, [1.5]])
def test_a_list_of_something_else_is_refused(name, value):
    assert refusal({name: value}).startswith(f"{name}: ")


TEXTS = [*LISTS, "quality"]


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("separated", [",".join, list], ids=["text", "array"])
def test_a_list_is_counted_before_it_is_looked_into(name, separated):
    """Ordinary validation of what has no items would name the parameter's own values."""
    items = separated(["all"] * (LONGEST_LIST + 1))
    assert refusal({name: items}) == f"{name}: a list of 1001 items is not allowed; allowed: at most {LONGEST_LIST}"
    assert read_parameters({name: separated(["all"] * LONGEST_LIST)})


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_text_longer_than_anybody_needs_is_refused(name):
    expected = f"{name}: a text of 100001 characters is not allowed; allowed: at most {LONGEST_TEXT}"
    assert refusal({name: "x" * (LONGEST_TEXT + 1)}) == expected


@pytest.mark.parametrize("value", ["deletion,deletion,insertion", "all,deletion,all", ["all"] * 1000])
def test_a_quality_named_twice_is_measured_once(value):
    found = list(read_parameters({"quality": value}).qualities())
    assert found == (["deletion", "insertion"] if "insertion" in value else list(QUALITIES))


@pytest.mark.parametrize("value", [True, False, [True], [1, False]])
def test_a_truth_is_no_target(value):
    assert refusal({"target": value}).startswith("target: ")


# Methods

TAKEN = [pytest.param(name, f.name, id=f"{name}-{f.name}") for name, kind in METHODS.items() for f in fields(kind)]


@pytest.mark.parametrize(("method", "parameter"), TAKEN)
def test_what_a_method_takes_can_be_asked_for(method, parameter):
    assert parameter in PARAMETERS


@pytest.mark.parametrize("method", METHODS)
def test_a_method_keeps_its_own_defaults(method):
    assert read_parameters().methods(method) == [METHODS[method]()]


@pytest.mark.parametrize(("method", "parameter"), TAKEN)
def test_a_parameter_reaches_its_method(method, parameter):
    asked = another(parameter)
    found = [getattr(made, parameter) for made in read_parameters({parameter: asked}).methods(method)]
    assert found == (asked if isinstance(asked, list) else [asked])


def test_a_methods_other_parameters_are_the_same_for_every_layer():
    assert read_parameters({"layer": "one,two"}).methods("grad_cam") == [GradCam("one"), GradCam("two")]


def test_no_smoothing_is_the_default():
    assert read_parameters({"samples": 3, "stdev": 0.5}).smoother() is None


@pytest.mark.parametrize("kind", SmoothingKind)
def test_smoothing_keeps_its_own_defaults(kind):
    assert read_parameters({"smoothing": kind.value}).smoother() == Smoothing(kind)


def test_samples_and_stdev_reach_the_smoothing():
    smoother = read_parameters({"smoothing": "vargrad", "samples": 3, "stdev": 0.5}).smoother()
    assert smoother == Smoothing(SmoothingKind.VARGRAD, samples=3, stdev=0.5)


@pytest.fixture
def flat_classifier():
    """One without any layer that a class activation map could be taken of."""
    return Classifier(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), Normalization((0.0,) * 3, (1.0,) * 3), (4, 4))


def choice_refusal(classifier, names):
    with pytest.raises(RequestError) as caught:
        Capabilities(classifier).choose(names)
    checked(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_but_that_of_attention_serves_a_convolutional_network(classifier, method):
    capabilities = Capabilities(classifier)
    if method in WITHOUT_ATTENTION:
        assert capabilities.choose([method]) == [method]
    else:
        assert "attention" in capabilities.refused[method]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_serves_or_says_why_not(flat_classifier, method):
    capabilities = Capabilities(flat_classifier)
    assert (method in capabilities.methods) != bool(capabilities.refused.get(method))


def test_a_method_that_cannot_serve_is_refused_with_the_reason(flat_classifier):
    reason = Capabilities(flat_classifier).refused["grad_cam"]
    assert choice_refusal(flat_classifier, ["grad_cam"]) == f"method: grad_cam cannot serve this model: {reason}"


def test_all_is_every_method_that_serves(classifier, flat_classifier):
    assert Capabilities(classifier).choose(["all"]) == list(WITHOUT_ATTENTION)
    assert "grad_cam" not in Capabilities(flat_classifier).choose(["all"])


def test_a_method_that_is_switched_off_is_neither_listed_nor_served(classifier, flat_classifier):
    capabilities = Capabilities(classifier, ("saliency", "grad_cam"))
    assert capabilities.choose(["all"]) == capabilities.methods == ["grad_cam", "saliency"]
    with pytest.raises(RequestError, match=r"^method: 'lrp' is not served by this archive; allowed: grad_cam, saliency, all$"):
        capabilities.choose(["lrp"])
    assert Capabilities(flat_classifier, ("saliency",)).refused == {}


def test_methods_are_chosen_in_the_order_asked_for(classifier):
    names = list(WITHOUT_ATTENTION)[::-1]
    assert Capabilities(classifier).choose(names) == names


def test_a_method_named_twice_is_explained_once_and_in_its_first_place(classifier):
    choose = Capabilities(classifier).choose
    assert choose(["lime", "grad_cam", "lime"]) == ["lime", "grad_cam"]
    assert choose(["all"] * 1000) == list(WITHOUT_ATTENTION)
    assert choose(["lime", "all"]) == ["lime", *(name for name in WITHOUT_ATTENTION if name != "lime")]


@pytest.mark.parametrize("name", ["", "gradcam", "GRAD_CAM", "x" * 100, "\u00e9", "\ud800"])
def test_an_unknown_method_is_refused_with_those_that_serve(flat_classifier, name):
    message = choice_refusal(flat_classifier, ["sensitivity", name])
    allowed = ", ".join(Capabilities(flat_classifier).methods)
    assert re.match(r"method: '.*('|\.\.\.) is unknown", message) and message.endswith(f"allowed: {allowed}, all")


def test_a_rule_for_one_class_has_none_for_all_of_them(classifier):
    capabilities, joins = Capabilities(classifier), {name for name in WITHOUT_ATTENTION if METHODS[name].explains_probability}
    classless = {name for name in METHODS if not METHODS[name].asks_for_class}
    assert joins and joins == set(capabilities.choose(["all"], Score.PROBABILITY))
    assert joins - classless == set(capabilities.choose(["all"], versus=Contrast.REST))
    for options, parameter in (({"score": Score.PROBABILITY}, "score"), ({"versus": Contrast.REST}, "versus")):
        with pytest.raises(RequestError, match=f"^{parameter}: lrp has no rule for .*; allowed: "):
            capabilities.choose(["grad_cam", "lrp"], **options)
    with pytest.raises(RequestError, match=r"^versus: eigen_cam explains no class"):
        capabilities.choose(["eigen_cam"], versus=1)
    assert set(capabilities.choose(["all"], versus=1)) == WITHOUT_ATTENTION.keys() - classless


# Labels

LABELS = Labels(["tabby", "red fox, Vulpes vulpes", "crane", "crane", "maillot", "7"])


def targets(value):
    asked = read_parameters({"target": value}).target
    assert asked is not None
    return LABELS.targets(asked)


def versus(value, *targets):
    asked = read_parameters({"versus": value}).versus
    assert asked is not None
    return LABELS.versus(asked, targets)


def target_refusal(value):
    with pytest.raises(RequestError) as caught:
        targets(value)
    checked(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("value", "indices"),
    [
        (4, [4]),
        (0, [0]),
        ("4", [4]),
        ("tabby", [0]),
        ("tabby,4", [0, 4]),
        (" tabby , maillot ", [0, 4]),
        ("4,4", [4, 4]),
        ("red fox, Vulpes vulpes", [1]),
        (["red fox, Vulpes vulpes", "tabby", 4, "2"], [1, 0, 4, 2]),
        ([3], [3]),
        (2.0, [2]),
    ],
    ids=str,
)
def test_a_target_is_an_index_a_label_or_a_list_of_them(value, indices):
    assert targets(value) == indices


@pytest.mark.parametrize("value", [6, -1, "6", "999999999999999999", 10**400, [0, 6], ["0", -1], "tabby,6", "7"])
def test_an_index_that_is_no_class_is_refused_with_the_range(value):
    message = target_refusal(value)
    assert message.startswith("target: ") and "from 0 to 5" in message


@pytest.mark.parametrize("value", ["Tabby", "", "tabby,", "-1", "1.0", "\u0661", "\u00e9", "\ud800", ["tabby,maillot"]])
def test_a_label_that_does_not_exist_is_refused_with_what_is_allowed(value):
    message = target_refusal(value)
    assert message.startswith("target: ") and message.endswith("allowed: an index from 0 to 5, or a label")


@pytest.mark.parametrize("value", ["crane", "tabby,crane", ["crane"]])
def test_a_shared_label_is_refused_with_its_indices(value):
    message = target_refusal(value)
    assert "'crane'" in message and "2, 3" in message


def test_a_class_of_a_shared_label_can_be_chosen_by_its_index():
    assert targets("2,3") == [2, 3]


def test_a_label_with_a_comma_inside_a_comma_list_is_refused():
    assert "'red fox'" in target_refusal("tabby,red fox, Vulpes vulpes")


@pytest.mark.parametrize(
    ("value", "expected"),
    [("tabby", 0), (4, 4), ("4", 4), ("red fox, Vulpes vulpes", 1), ("rest", "rest"), ("runner_up", "runner_up")],
)
def test_versus_is_a_class_or_what_stands_for_one(value, expected):
    found = versus(value, None, 2)
    assert found == expected and isinstance(found, Contrast) == (value in ("rest", "runner_up"))


@pytest.mark.parametrize("value", ["Rest", "tabby,4", "crane", 6, "6", "", "2", 2])
def test_versus_that_is_no_class_or_the_target_is_refused_with_what_is_allowed(value):
    with pytest.raises(RequestError) as caught:
        versus(value, 2)
    checked(caught.value)
    told = str(caught.value)
    assert told.startswith("versus: ") and ("2, 3" in told if value == "crane" else told.endswith("runner_up or rest"))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30) | st.integers() | st.lists(st.text(max_size=10) | st.integers(), min_size=1, max_size=3))
def test_any_target_is_found_or_refused(value):
    try:
        found = targets(value)
    except RequestError as error:
        checked(error)
    else:
        assert found and all(0 <= index < len(LABELS.names) for index in found)


def test_methods_that_share_a_parameter_allow_the_same():
    types = {}
    for field in (field for method in METHODS.values() for field in fields(method)):
        types.setdefault(field.name, []).append(field.type)
    assert all(kind == kinds[0] for kinds in types.values() for kind in kinds)

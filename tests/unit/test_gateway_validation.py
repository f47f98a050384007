from __future__ import annotations

import json

import pytest
from fake_backend import MODEL
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.order import ImageOrder, limits_of, order_images
from services.gateway.validation import GenerationBody, parse_body
from shared import codec
from shared.errors import InvalidRequestError
from shared.messages import GenerateImage
from shared.settings import GatewaySettings

LIMITS = limits_of(MODEL, GatewaySettings())


def order(**fields: object) -> ImageOrder:
    body = json.dumps({"prompt": "a cat", **fields}).encode()
    return order_images(parse_body(body), LIMITS, random_seed=7)


BAD_FIELDS = [
    ("prompt", "", "1 to 32,000 characters"),
    ("prompt", "x" * 32_001, "1 to 32,000 characters"),
    ("prompt", None, "1 to 32,000 characters"),
    ("prompt", ["a cat"], "1 to 32,000 characters"),
    ("prompt", "\ud800", "not valid Unicode"),
    ("prompt", "a\0b", "NUL"),
    ("negative_prompt", "x" * 32_001, "at most 32,000 characters"),
    ("negative_prompt", 3, "a string"),
    ("model", 3, "a string"),
    ("n", 0, "1 to 10"),
    ("n", 11, "1 to 10"),
    ("n", 2.5, "an integer"),
    ("n", "2", "an integer"),
    ("n", True, "an integer"),
    ("n", 10**4000, "an integer"),
    ("size", "512", '"WIDTHxHEIGHT" with sides from 8 to 256 in multiples of 8'),
    ("size", "0x0", "from 8 to 256"),
    ("size", "-8x8", "from 8 to 256"),
    ("size", "100x128", "multiples of 8"),
    ("size", "264x128", "from 8 to 256"),
    ("size", "99999999x8", "from 8 to 256"),
    ("size", "\u0661\u0662\u0668x128", "from 8 to 256"),
    ("size", 128, "a string"),
    ("response_format", "base64", '"b64_json" or "url"'),
    ("output_format", "gif", '"png", "jpeg" or "webp"'),
    ("output_format", "svg", '"png", "jpeg" or "webp"'),
    ("output_compression", 101, "0 to 100"),
    ("output_compression", -1, "0 to 100"),
    ("background", "transparent", '"opaque" or "auto"'),
    ("stream", "yes", "true or false"),
    ("partial_images", 4, "0 to 3"),
    ("quality", "best", '"low"'),
    ("style", "baroque", '"vivid" or "natural"'),
    ("moderation", "off", '"low" or "auto"'),
    ("complexity", 3, '"low"'),
    ("user", "x" * 513, "512"),
    ("frame_count", 4, "null only"),
    ("svg", {"model": "m"}, "null only"),
    ("seed", -1, "0 to 9223372036854775807"),
    ("seed", 2**63, "0 to 9223372036854775807"),
    ("seed", 1.5, "an integer"),
    ("num_inference_steps", 0, "at least 1"),
    ("num_inference_steps", 151, "1 to 150 with sampler ddim"),
    ("num_inference_steps", 10**30, "1 to 150"),
    ("guidance_scale", -0.5, "0 to 50"),
    ("guidance_scale", 50.1, "0 to 50"),
    ("guidance_scale", float("nan"), "0 to 50"),
    ("guidance_scale", float("inf"), "0 to 50"),
    ("guidance_scale", "7", "a number"),
    ("sampler", "plms", "ddim, euler, lcm"),
    ("sampler", "", "ddim, euler, lcm"),
    ("guidance_skip", "some", '"off", "balanced" or "fast"'),
    ("priority", 101, "-100 to 100"),
    ("deadline_ms", -1, "0 to 86400000"),
]


@pytest.mark.parametrize(("field", "value", "allowed"), BAD_FIELDS)
def test_a_bad_field_is_named_with_what_it_may_hold(
    field: str, value: object, allowed: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        order(**{field: value})
    assert caught.value.field == field
    assert f"'{field}'" in str(caught.value)
    assert allowed in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "payload",
    [b"", b"{", b"prompt=cat", b"\xff\xfe", b"[" * 100_000, b'{"prompt":"x","n":' + b"1" * 9_999],
)
def test_a_body_that_is_not_json_is_refused_as_a_whole(payload: bytes) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_body(payload)
    assert caught.value.field is None


@pytest.mark.parametrize("payload", [b"[]", b"3", b'"a cat"', b"null", b"NaN"])
def test_a_body_that_is_no_object_is_refused_as_a_whole(payload: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="a JSON object"):
        parse_body(payload)


def test_a_missing_prompt_is_named() -> None:
    with pytest.raises(InvalidRequestError, match="'prompt' is missing") as caught:
        parse_body(b"{}")
    assert caught.value.field == "prompt"


def test_all_bad_fields_are_told_at_once() -> None:
    with pytest.raises(InvalidRequestError, match=r"'n' is 0.*'seed' is -3") as caught:
        order(n=0, seed=-3)
    assert caught.value.field == "n"


def test_steps_beyond_a_sampler_s_own_limit_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="1 to 50 with sampler lcm"):
        order(sampler="lcm", num_inference_steps=51)


def test_a_seed_that_leaves_no_room_for_n_consecutive_ones_is_refused() -> None:
    assert order(seed=2**63 - 2, n=2).images[-1].seed == 2**63 - 1
    with pytest.raises(InvalidRequestError, match="consecutive") as caught:
        order(seed=2**63 - 1, n=2)
    assert caught.value.field == "seed"


def test_a_stream_of_several_pictures_is_refused() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        order(n=2, stream=True)
    assert caught.value.field == "n"


def test_nulls_are_the_same_as_nothing() -> None:
    names = set(GenerationBody.model_fields) - {"prompt"}
    assert order(**dict.fromkeys(names)) == order()


def test_every_parameter_of_openai_s_is_taken() -> None:
    made = order(
        background="opaque",
        complexity="low",
        moderation="low",
        n=2,
        output_compression=50,
        output_format="webp",
        partial_images=0,
        quality="hd",
        response_format="url",
        safety_identifier="a",
        size="64x128",
        stream=False,
        style="vivid",
        user="b",
    )
    assert [image.seed for image in made.images] == [7, 8]
    assert (made.images[0].width, made.images[0].height) == (64, 128)
    assert made.images[0].output_compression == 50
    assert len(made.warnings) == 3


def test_what_is_left_out_is_filled_in_from_model_and_settings() -> None:
    (image,) = order().images
    assert (image.width, image.height) == (128, 128)
    assert image.num_inference_steps == 25
    assert image.guidance_scale == 5.0
    assert image.sampler == "ddim"
    assert image.output_format == "png"
    assert image.output_compression == 100
    assert image.negative_prompt == ""
    assert image.seed == 7


def test_naming_a_seed_turns_skipping_off_unless_it_is_asked_for() -> None:
    assert order().images[0].guidance_skip == "balanced"
    assert order(seed=3).images[0].guidance_skip == "off"
    assert order(seed=3, guidance_skip="fast").images[0].guidance_skip == "fast"


def test_the_service_s_cap_on_skipping_holds_for_every_request() -> None:
    limits = limits_of(MODEL, GatewaySettings(max_guidance_skip="balanced"))
    asked = [b"null", b'"off"', b'"balanced"', b'"fast"']
    orders = [
        order_images(
            parse_body(b'{"prompt": "x", "guidance_skip": ' + level + b"}"), limits, random_seed=0
        )
        for level in asked
    ]
    levels = [order.images[0].guidance_skip for order in orders]
    assert levels == ["balanced", "off", "balanced", "balanced"]
    assert [len(order.warnings) for order in orders] == [0, 0, 0, 1]


def test_unknown_fields_are_ignored_and_told() -> None:
    made = order(brand_new=True, **{"\ud800": 1})
    assert "'brand_new' is not known here and was ignored." in made.warnings
    assert len(made.warnings) == 2


def test_a_default_beyond_the_limit_is_cut_to_it() -> None:
    limits = limits_of(MODEL, GatewaySettings(default_steps=80, default_sampler="lcm"))
    body = parse_body(b'{"prompt": "x"}')
    (image,) = order_images(body, limits, random_seed=0).images
    assert (image.sampler, image.num_inference_steps) == ("lcm", 50)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
plausible = {
    "prompt": st.text(st.characters(codec=None), min_size=1, max_size=40),
    "n": st.integers(0, 11),
    "size": st.sampled_from(["auto", "64x64", "8x256", "7x8", "300x8", "x"]),
    "seed": st.integers(-1, 2**63),
    "num_inference_steps": st.integers(0, 151),
    "guidance_scale": st.floats(-1, 60) | st.integers(-1, 60),
    "sampler": st.sampled_from(["ddim", "euler", "lcm", "plms"]),
    "output_format": st.sampled_from(["png", "jpeg", "webp", "gif"]),
    "stream": st.booleans(),
    "background": st.sampled_from(["auto", "transparent"]),
}
bodies = json_values | st.fixed_dictionaries(
    {"prompt": plausible["prompt"] | json_values},
    optional={
        name: plausible.get(name, json_values) | json_values
        for name in [*GenerationBody.model_fields, "unknown"]
        if name != "prompt"
    },
)


def try_order(value: object) -> ImageOrder | InvalidRequestError:
    try:
        body = parse_body(json.dumps(value).encode())
        return order_images(body, LIMITS, random_seed=1)
    except InvalidRequestError as error:
        return error


@settings(max_examples=100, deadline=None)
@given(bodies)
def test_any_json_is_an_order_that_can_be_sent_or_an_error_that_names_a_field(
    value: object,
) -> None:
    match try_order(value):
        case InvalidRequestError() as error:
            str(error).encode()
            is_body_at_fault = error.field is None and not isinstance(value, dict)
            assert is_body_at_fault or error.field in GenerationBody.model_fields
        case ImageOrder(images=images, warnings=warnings):
            "".join(warnings).encode()
            for image in images:
                message = GenerateImage(
                    request_id="r",
                    job_id="j",
                    owner="",
                    priority=0,
                    deadline_ms=0,
                    submitted_at=0.0,
                    parameters=image,
                )
                assert codec.decode(codec.encode(message)) == message

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from dist_vlm.multimodal.image import ImageFeatureData, ImagePixelData
from dist_vlm.sampling import SamplingParams
from dist_vlm.workers.coded_pixels import decoded

IMAGE_ID = 32000
GREEDY = SamplingParams(temperature=0)


def picture(seed=0, size=(80, 60)):
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def process(front, inputs, params=GREEDY):
    (request,) = front.processor.process("r", inputs, params).requests
    return request


def test_tokens_and_pixels_are_what_transformers_prepares(front, tiny_facts):
    text, image = "USER: <image>\nWhat is it? ASSISTANT:", picture()
    reference = AutoProcessor.from_pretrained(tiny_facts, backend="pil")(images=[image], text=[text])
    request = process(front, {"prompt": text, "multi_modal_data": {"image": image}})
    assert list(request.prompt_token_ids) == list(reference["input_ids"][0])
    (only,) = request.images
    assert only.kind == "coded_pixels"
    np.testing.assert_array_equal(decoded(only.array), np.asarray(reference["pixel_values"]), strict=True)
    assert (only.span.start, only.span.count) == (request.prompt_token_ids.index(IMAGE_ID), 16)


def test_one_placeholder_and_the_whole_run_are_the_same_prompt(front):
    data = {"multi_modal_data": ImagePixelData(picture())}
    short = process(front, {"prompt": "<image>\nUSER: hi", **data})
    long = process(front, {"prompt": "<image>" * 16 + "\nUSER: hi", **data})
    assert short.prompt_token_ids == long.prompt_token_ids
    assert short.images[0].span == long.images[0].span


def test_two_images_get_their_own_runs_in_order(front):
    images = [picture(1), picture(2)]
    request = process(front, {"prompt": "a <image> b <image>", "multi_modal_data": {"image": images}})
    first, second = (image.span for image in request.images)
    assert first.image != second.image
    assert first.end <= second.start
    assert list(request.prompt_token_ids[second.start : second.end]) == [IMAGE_ID] * 16
    adjacent = process(front, {"prompt": "<image>" * 32, "multi_modal_data": {"image": images}})
    assert [image.span.start for image in adjacent.images] == [1, 17]


def test_the_same_picture_has_the_same_key_and_another_has_another(front):
    def key(image):
        return process(front, {"prompt": "<image>", "multi_modal_data": {"image": image}}).images[0].span.image

    assert key(picture(1)) == key(picture(1).copy())
    assert key(picture(1)) != key(picture(2))


def test_tensors_enter_as_they_are(front):
    pixels = torch.randn(3, 56, 56)
    request = process(front, {"prompt": "<image>", "multi_modal_data": ImagePixelData(pixels)})
    np.testing.assert_array_equal(request.images[0].array, pixels[None].numpy())
    features = torch.randn(1, 16, 64, dtype=torch.bfloat16)
    request = process(front, {"prompt": "<image>", "multi_modal_data": ImageFeatureData(features)})
    assert request.images[0].kind == "image_features"
    np.testing.assert_array_equal(request.images[0].array, features.float().numpy())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("", "prompt is empty"),
        ({"prompt_token_ids": []}, "prompt_token_ids is empty"),
        ({"prompt_token_ids": [32064]}, r"holds 32064: must be in 0 .. 32063"),
        ({"prompt_token_ids": [-1]}, "holds -1"),
        ({"prompt_token_ids": [5] * 128}, "128 tokens long.*at most 127 are allowed"),
        ("<image> what?", "1 image placeholders, but multi_modal_data has no image"),
        ({"prompt": "what?", "multi_modal_data": {"image": picture()}}, r"0 image placeholders for 1 image.*\(1\)"),
        ({"prompt": "<image>" * 15, "multi_modal_data": {"image": picture()}}, r"15 image placeholders.*\(16\)"),
        (
            {"prompt": "<image>" * 7 + "x" + "<image>" * 9, "multi_modal_data": {"image": picture()}},
            "16 placeholders of image 0 do not stand together",
        ),
        ({"prompt": "<image>", "multi_modal_data": {"image": Image.new("RGB", (0, 5))}}, "image 0: 0x5 has no pixels"),
        ({"prompt": "<image>", "multi_modal_data": {"image": "a.png"}}, "image 0 of type str"),
        ({"prompt": "<image>", "multi_modal_data": {"video": picture()}}, "the key 'video'"),
        ({"prompt": "<image>", "multi_modal_data": picture()}, "multi_modal_data of type Image"),
        ({"prompt": "<image>", "multi_modal_data": {"image": [picture()] * 17}}, "17 images; at most 16"),
        ({"prompt": "<image>", "multi_modal_data": ImagePixelData(torch.ones(3, 56, 57))}, r"shape \(3, 56, 57\)"),
        ({"prompt": "<image>", "multi_modal_data": ImagePixelData(torch.ones(3, 56, 56).int())}, "dtype torch.int32"),
        ({"prompt": "<image>", "multi_modal_data": ImageFeatureData(torch.ones(1, 15, 64))}, r"shape \(1, 15, 64\)"),
        ({"prompt": "<image>", "multi_modal_data": ImageFeatureData([1.0])}, "image_features of type list"),
        (
            {"prompt": "<image>", "multi_modal_data": ImageFeatureData(torch.full((1, 16, 64), torch.nan))},
            "NaN or infinity",
        ),
    ],
)
def test_a_wrong_request_is_named(front, inputs, message):
    with pytest.raises(ValueError, match=message):
        process(front, inputs)


class _Undecodable(Image.Image):
    """A picture whose header says 200 million pixels; decoding it would fail the test."""

    def __init__(self):
        super().__init__()
        self._mode, self._size = "RGB", (20_000, 10_000)

    def load(self):
        raise AssertionError("the picture was decoded")


def test_a_picture_too_large_is_refused_undecoded(front):
    with pytest.raises(ValueError, match="200000000 pixels; at most 67108864"):
        process(front, {"prompt": "<image>", "multi_modal_data": {"image": _Undecodable()}})


def test_a_prompt_too_long_is_refused_before_its_picture_is_decoded(front):
    with pytest.raises(ValueError, match="tokens long"):
        process(front, {"prompt": "<image>" + " word" * 200, "multi_modal_data": {"image": _Undecodable()}})


def test_a_sampling_field_not_served_is_refused_by_name(front):
    with pytest.raises(ValueError, match="use_beam_search = True"):
        process(front, "hi", SamplingParams(use_beam_search=True))
    with pytest.raises(ValueError, match="sampling_params of type dict"):
        process(front, "hi", {"temperature": 0})
    spoilt = SamplingParams()
    spoilt.min_p = float("nan")
    with pytest.raises(ValueError, match="min_p = nan"):
        process(front, "hi", spoilt)


def test_several_answers_are_requests_of_their_own_over_one_prompt(front):
    params = SamplingParams(n=2, best_of=3, max_tokens=5, stop_token_ids=[9])
    inputs = {"prompt": "<image> what?", "multi_modal_data": {"image": picture()}, "cache_salt": "tenant"}
    processed = front.processor.process("7", inputs, params, priority=-3)
    assert (processed.request_id, processed.prompt) == ("7", "<image> what?")
    assert [request.request_id for request in processed.requests] == ["7/0", "7/1", "7/2"]
    assert [request.sampling.sample_index for request in processed.requests] == [0, 1, 2]
    first = processed.requests[0]
    for request in processed.requests:
        assert request.prompt_token_ids is first.prompt_token_ids
        assert request.images is first.images
        assert (request.max_tokens, request.stop_token_ids) == (5, {2, 9})
        assert (request.priority, request.cache_salt) == (-3, "tenant")


def test_one_answer_has_the_requests_id(front):
    (request,) = front.processor.process("7", "hi", GREEDY).requests
    assert (request.request_id, request.priority, request.cache_salt) == ("7", 0, "")


@pytest.mark.parametrize("priority", [2**31, -(2**31) - 1, 1.0, True, "high", None])
def test_a_wrong_priority_is_named(front, priority):
    with pytest.raises(ValueError, match=r"^priority = .*: must be an integer, at least -2147483648"):
        front.processor.process("7", "hi", GREEDY, priority=priority)


def test_a_prompt_is_cut_to_its_last_tokens(front):
    whole = process(front, {"prompt_token_ids": list(range(5, 200))}, SamplingParams(truncate_prompt_tokens=100))
    assert list(whole.prompt_token_ids) == list(range(100, 200))
    short = process(front, {"prompt_token_ids": [5, 6]}, SamplingParams(truncate_prompt_tokens=100))
    assert list(short.prompt_token_ids) == [5, 6]
    with pytest.raises(ValueError, match="128 tokens long"):
        process(front, {"prompt_token_ids": [5] * 200}, SamplingParams(truncate_prompt_tokens=128))


def test_no_image_is_cut(front):
    """Tokens 0 .. 9 are text, 10 .. 25 the first image, 26 .. 41 the second, 42 .. 44 text again."""
    inputs = {
        "prompt_token_ids": [5] * 10 + [IMAGE_ID] * 2 + [6] * 3,
        "multi_modal_data": {"image": [picture(1), picture(2)]},
    }
    kept = process(front, inputs, SamplingParams(truncate_prompt_tokens=35))
    assert list(kept.prompt_token_ids) == [IMAGE_ID] * 32 + [6] * 3
    assert [image.span.start for image in kept.images] == [0, 16]
    kept = process(front, inputs, SamplingParams(truncate_prompt_tokens=40))
    assert [image.span.start for image in kept.images] == [5, 21]
    for keep in (1, 19, 34):
        message = f"truncate_prompt_tokens = {keep}: would cut off image 0.*token 10 of the prompt's 45.*at least 35"
        with pytest.raises(ValueError, match=message):
            process(front, inputs, SamplingParams(truncate_prompt_tokens=keep))


def test_limits_and_stop_tokens(front):
    request = process(front, {"prompt_token_ids": [5] * 100}, SamplingParams(max_tokens=500, stop_token_ids=[9]))
    assert request.max_tokens == 28
    assert request.stop_token_ids == {9, 2}
    request = process(front, "hi", SamplingParams(max_tokens=None, ignore_eos=True))
    assert request.max_tokens == 128 - len(request.prompt_token_ids)
    assert request.stop_token_ids == frozenset()

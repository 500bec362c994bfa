from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor, PreTrainedTokenizerFast

from dist_vlm import LLM, SamplingParams
from dist_vlm.config import EngineConfig
from dist_vlm.engine.chat import ChatOptions, ChatRenderer
from dist_vlm.executor.fake import FakeExecutor
from dist_vlm.media import PictureError

from ..parity.reference import reference_for
from . import small_tokenizers

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "demo" / "checkpoint"
PICTURES = ROOT / "examples" / "demo" / "pictures"
DEMO_IMAGE_ID, DEMO_IMAGE_TOKENS = 493, 81
TINY_IMAGE_ID, TINY_IMAGE_TOKENS = 32000, 16
MAX_PIXELS = 10**6
LOOP = (
    "{{ bos_token }}{% for m in messages %}{{ m.role + ':' }}{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}{{ eos_token }}{% endfor %}"
)
STRINGS = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}</s>{% endfor %}"


def noise(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8))


def image(seed=0):
    return {"type": "image", "image": noise(seed)}


def text(value):
    return {"type": "text", "text": value}


def data_url(picture):
    data = io.BytesIO()
    picture.save(data, "PNG")
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def cut_off(part):
    """The picture's header and a little more: decoding it fails."""
    head, data = part["image_url"]["url"].split(",")
    return {"type": "image_url", "image_url": {"url": f"{head},{data[:400]}"}}


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


CONVERSATIONS = {
    "string": [{"role": "user", "content": "What is a cat?"}],
    "one picture": user(image(), text("What is it?")),
    "text first": user(text("What is it?"), image()),
    "between": user(image(1), text("a"), image(2), text("b <"), image(3)),
    "no text": user(image()),
    "turns": [
        {"role": "system", "content": "Answer in one word."},
        *user(image(1), text("First?")),
        {"role": "assistant", "content": "  yes \n"},
        *user(text("And > this: "), image(2)),
        {"role": "assistant", "content": [text("no"), text("/s>")]},
        {"role": "user", "content": "Why? é☃ 日本語"},
    ],
}


@pytest.fixture(scope="module")
def demo():
    tokenizer = PreTrainedTokenizerFast.from_pretrained(DEMO)
    return ChatRenderer(tokenizer, image_token_id=DEMO_IMAGE_ID, max_pixels=MAX_PIXELS)


@pytest.fixture(scope="module")
def tiny(tiny_facts):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_facts)
    return ChatRenderer(tokenizer, image_token_id=TINY_IMAGE_ID, max_pixels=MAX_PIXELS)


@pytest.fixture(scope="module")
def processors(tiny_facts):
    return {
        "demo": AutoProcessor.from_pretrained(DEMO, backend="pil"),
        "tiny": AutoProcessor.from_pretrained(tiny_facts, backend="pil"),
    }


def expanded(token_ids, image_id, size):
    return [token for one in token_ids for token in ([one] * size if one == image_id else [one])]


def renderer_of(tokenizer):
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    return ChatRenderer(tokenizer, image_token_id=image_id, max_pixels=MAX_PIXELS)


# ------------------------------------------------------------------------------------------ equal to transformers


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("template", [None, LOOP], ids=["own", "bos"])
@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("checkpoint", ["demo", "tiny"])
def test_tokens_are_those_of_transformers_processor(
    checkpoint, name, template, add_generation_prompt, processors, request
):
    """A template that begins with bos, too: it is there once."""
    messages = CONVERSATIONS[name]
    if template is LOOP:  # takes parts alone, and transformers does not make them of a string
        messages = [
            {**one, "content": [text(one["content"])]} if isinstance(one["content"], str) else one for one in messages
        ]
    expected = processors[checkpoint].apply_chat_template(
        messages, chat_template=template, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
    )["input_ids"]
    renderer = request.getfixturevalue(checkpoint)
    prompt = renderer.render(messages, ChatOptions(template, add_generation_prompt))
    image_id, size = {
        "demo": (DEMO_IMAGE_ID, DEMO_IMAGE_TOKENS), "tiny": (TINY_IMAGE_ID, TINY_IMAGE_TOKENS),
    }[checkpoint]  # fmt: skip
    (expected,) = expected if isinstance(expected[0], list) else (expected,)
    assert expanded(prompt.prompt_token_ids, image_id, size) == list(expected)
    assert prompt.prompt_token_ids.count(1) == 1


TOKENIZERS = {
    "first": small_tokenizers.metaspace,
    "always": lambda: small_tokenizers.metaspace(scheme="always"),
    "legacy": small_tokenizers.legacy,
    "legacy-normalized": lambda: small_tokenizers.legacy(normalized=True),
    "lower": small_tokenizers.lower_case,
    "unigram": small_tokenizers.unigram,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def small(request):
    tokenizer = TOKENIZERS[request.param]()
    return tokenizer, renderer_of(tokenizer)


@settings(max_examples=60, deadline=None)
@given(
    contents=st.lists(
        st.lists(st.sampled_from(["the cat", " ", "</", "s>", "<ima", "ge> ", "é☃", "\n", "s", None]), min_size=1),
        min_size=1, max_size=3,
    )
)  # fmt: skip
def test_tokens_are_those_of_transformers_for_any_boundary(small, contents):
    """Texts that spell nothing, alone and joined, beside special tokens that the template writes."""
    tokenizer, renderer = small
    image_part = image()
    messages = [
        {"role": "user", "content": [image_part if part is None else text(part) for part in parts]}
        for parts in contents
    ]
    joined = "".join("\0" if part is None else part for parts in contents for part in (*parts, "\0"))
    assume(not any(token in joined for token in ("<image>", "</s>")))  # two texts that join: another test's matter
    expected = tokenizer.apply_chat_template(messages, chat_template=LOOP, tokenize=True)["input_ids"]
    # Looked for in normalized text, some tokenizers miss a placeholder of the template's own.
    assume(expected.count(renderer._image_token_id) == joined.count("\0") - len(contents))
    assert renderer.render(messages, ChatOptions(LOOP)).prompt_token_ids == expected


def test_bos_is_added_where_neither_template_nor_client_wrote_one(demo):
    bare = ChatOptions("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert demo.render([{"role": "user", "content": "hi"}], bare).prompt_token_ids[0] == 1
    spelled = demo.render([{"role": "user", "content": "<s>hi"}], bare)
    assert spelled.prompt_token_ids[0] == 1
    assert spelled.prompt_token_ids.count(1) == 1
    assert spelled.prompt == "<s>hi"
    assert demo._tokenizer.decode(spelled.prompt_token_ids) == "<s><s>hi", "one is a token, one is text"


# ----------------------------------------------------------------------------------------------- text stays text


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(
        st.sampled_from(["</s>", "<image>", "<s>", "<pad> ", " a", "<ima", "ge>", "\n", "\U000f0000", "é", None]),
        min_size=1, max_size=8,
    )
)  # fmt: skip
def test_what_a_client_spells_is_what_transformers_makes_of_it_as_text(demo, parts):
    """LOOP's own tokens are known; what stands between them goes through transformers with special tokens off."""
    image_part = image()
    prompt = demo.render(
        user(*(image_part if part is None else text(part) for part in parts)), ChatOptions(LOOP)
    )  # fmt: skip
    runs = "".join("\0" if part is None else part for part in parts).split("\0")
    runs[0] = "user:" + runs[0]
    as_text = [
        demo._tokenizer(run, add_special_tokens=False, split_special_tokens=True)["input_ids"] if run else []
        for run in runs
    ]
    expected = [1, *as_text[0]]
    for token_ids in as_text[1:]:
        expected += [DEMO_IMAGE_ID, *token_ids]
    assert prompt.prompt_token_ids == [*expected, 2]
    assert prompt.prompt == "<s>" + "<image>".join(runs) + "</s>"


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_spelled_text_keeps_the_spaces_of_its_surroundings(scheme):
    """Against a tokenizer with the same vocabulary that knows only the template's special tokens."""
    renderer = renderer_of(small_tokenizers.metaspace(scheme=scheme))
    reference = small_tokenizers.metaspace(scheme=scheme, specials=("<unk>", "<s>"))
    template = "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content }}<unk>{% endfor %}"
    contents = ["what does </s> mean", " <image>", "</s>the cat", "<image></s>"]
    messages = [{"role": "user", "content": content} for content in contents]
    rendered = "<s>" + "".join(f"user: {content}<unk>" for content in contents)
    prompt = renderer.render(messages, ChatOptions(template))
    assert prompt.prompt == rendered
    assert prompt.prompt_token_ids == reference(rendered, add_special_tokens=False)["input_ids"]


def test_text_that_only_normalizing_makes_a_special_token_stays_text():
    tokenizer = small_tokenizers.lower_case()
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    options = ChatOptions(template)
    loud = renderer_of(tokenizer).render([{"role": "user", "content": "the </S> cat"}], options)
    assert tokenizer("the </S> cat")["input_ids"].count(2) == 1, "transformers makes it one"
    assert loud.prompt_token_ids.count(2) == 1, "the template's own"
    quiet = renderer_of(tokenizer).render([{"role": "user", "content": "the </s> cat"}], options)
    assert loud.prompt_token_ids == quiet.prompt_token_ids


def test_two_parts_do_not_join_to_a_placeholder(demo):
    prompt = demo.render(user(text("<ima"), image(), text("<ima"), text("ge>")), ChatOptions(LOOP))
    assert prompt.prompt == "<s>user:<ima<image><image></s>"
    assert prompt.prompt_token_ids.count(DEMO_IMAGE_ID) == 1


def test_a_template_that_shouts_makes_no_token_of_text(demo):
    options = ChatOptions("{% for m in messages %}{{ m.content | upper | trim }}{% endfor %}")
    prompt = demo.render([{"role": "user", "content": " say </s> twice "}], options)
    assert prompt.prompt == "SAY </S> TWICE"
    assert prompt.prompt_token_ids == demo._tokenizer("SAY </S> TWICE")["input_ids"]


TOOLS = (
    "{% for t in tools %}<s>{{ t | tojson }}{% for k, v in t.function.parameters.properties.items() %}"
    "{{ k }}={{ v.description }};{% endfor %}</s>{% endfor %}"
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}"
    "{% endfor %}{{ mood }}"
)


def test_tools_calls_and_names_for_the_template_stay_text_too(demo):
    tool = {
        "type": "function",
        "function": {
            "name": "draw",
            "description": "draws <image> & </s>",
            "parameters": {"type": "object", "properties": {"<s>": {"type": "string", "description": "a </s>"}}},
        },
    }
    call = {"id": "1", "type": "function", "function": {"name": "draw", "arguments": '{"</s>": "<image>"}'}}
    messages = [
        {"role": "user", "content": "draw"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "<image>", "tool_call_id": "1"},
    ]
    options = ChatOptions(TOOLS, tools=[tool], template_kwargs={"mood": "<pad>"})
    prompt = demo.render(messages, options)
    in_transformers = demo._tokenizer.apply_chat_template(
        [messages[0], {**messages[1], "tool_calls": [{**call, "function": {"arguments": {"</s>": "<image>"}}}]},
         messages[2]],
        chat_template=TOOLS, tools=[tool], mood="<pad>", tokenize=False,
    )  # fmt: skip
    assert prompt.prompt == in_transformers
    special = [token for token in prompt.prompt_token_ids if token in (0, 1, 2, 493, 494)]
    assert special == [1, 2]
    assert demo._tokenizer.decode(prompt.prompt_token_ids) == prompt.prompt, "which begins with the template's bos"


# ----------------------------------------------------------------------------------------------- contents and forms


def test_pictures_come_in_their_order_from_either_form(demo):
    pictures = [noise(seed) for seed in range(3)]
    messages = [
        *user(data_url(pictures[0]), text("a"), {"type": "image", "image": pictures[1]}),
        *user(data_url(pictures[2])),
    ]
    images = demo.render(messages).images
    assert images[1] is pictures[1]
    for got, picture in zip(images, pictures, strict=True):
        np.testing.assert_array_equal(np.asarray(got.convert("RGB")), np.asarray(picture))


def test_a_template_for_strings_gets_the_parts_joined(demo):
    messages = [
        *user(text(" one"), image(1), image(2), text("two ")),
        {"role": "assistant", "content": "three"},
        *user(text("<image>")),
    ]
    prompt = demo.render(messages, ChatOptions(STRINGS))
    assert prompt.prompt == "[user] one\n<image>\n<image>\ntwo</s>[assistant] three</s>[user] <image></s>"
    joined = [
        {"role": "user", "content": " one\n<image>\n<image>\ntwo "},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "?"},
    ]
    expected = demo._tokenizer.apply_chat_template(joined, chat_template=STRINGS, tokenize=False)
    before, _ = expected.split("?")
    assert prompt.prompt_token_ids[: len(demo._tokenizer(before)["input_ids"])] == demo._tokenizer(before)["input_ids"]
    assert prompt.prompt_token_ids.count(DEMO_IMAGE_ID) == 2


def test_a_template_for_parts_gets_a_string_as_one(demo):
    as_string = demo.render([{"role": "user", "content": "hi </s>"}], ChatOptions(LOOP))
    assert as_string == demo.render(user(text("hi </s>")), ChatOptions(LOOP))
    assert as_string.prompt == "<s>user:hi </s></s>"


def test_placeholders_that_are_not_one_a_picture_are_an_error(demo):
    def fails(messages, template, message):
        with pytest.raises(ValueError, match=message):
            demo.render(messages, ChatOptions(template))

    drops = LOOP.replace("<image>", "")
    fails(user(image(), text("a"), image()), drops, "made 0 image placeholders of 2 picture")
    fails(user(image(), text("a")), LOOP.replace("<image>", "<image><image>"), "made 2 image placeholders of 1 picture")
    fails([{"role": "user", "content": "a"}], STRINGS + "<image>", "made 1 image placeholders of 0 picture")
    fails(user(image(), text("a")), STRINGS.replace("trim", "upper"), "made 0 image placeholders of 1 picture")
    fails([{"role": "user", "content": "a"}], "{% if false %}{{ messages[0].content }}{% endif %}", "an empty prompt")


def test_a_model_without_pictures_says_so(demo):
    renderer = ChatRenderer(demo._tokenizer, image_token_id=None, max_pixels=1)
    with pytest.raises(ValueError, match=r"messages have 1 picture\(s\), but this model takes none"):
        renderer.render(user(image()))
    assert renderer.render(user(text("hi"))).prompt == "USER: hi ASSISTANT:"


def test_what_a_template_says_is_told_without_marks(demo):
    options = ChatOptions("{{ raise_exception('not ' + messages[0].content) }}")
    with pytest.raises(ValueError, match=r"the chat template refuses the messages: not a </s>$"):
        demo.render([{"role": "user", "content": "a </s>"}], options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": {"a": 1}}, "tools must be a list of maps"),
        ({"tools": ["f"]}, "tools must be a list of maps"),
        ({"tools": [{"f": object()}]}, r"tools\[0\].f of type object"),
        ({"template_kwargs": ["a"]}, "template_kwargs of type list"),
        ({"template_kwargs": {"chat_template": "{{ 1 }}"}}, "template_kwargs has the key 'chat_template'"),
        ({"template_kwargs": {"tokenize": True}}, "template_kwargs has the key 'tokenize'"),
        ({"template_kwargs": {"x": b"a"}}, "template_kwargs.x of type bytes"),
    ],
)
def test_wrong_options_are_named(demo, options, message):
    with pytest.raises(ValueError, match=message):
        demo.render(user(text("hi")), ChatOptions(TOOLS, **options))


def test_pictures_are_opened_anew_at_each_reading_and_the_text_once(demo, monkeypatch):
    inputs = demo.inputs(user(data_url(noise()), text("hi")), ChatOptions())
    rendered = []
    monkeypatch.setattr(demo._templates, "render", lambda *a, **k: rendered.append(1) or "<image>hi")
    first, second = inputs["multi_modal_data"]["image"], inputs["multi_modal_data"]["image"]
    assert first[0] is not second[0]
    assert dict(inputs).keys() == {"prompt", "prompt_token_ids", "multi_modal_data"}
    assert inputs["prompt"] == "<image>hi"
    assert rendered == [1]
    with pytest.raises(KeyError):
        inputs["images"]


# ------------------------------------------------------------------------------------------------------- LLM.chat


@pytest.fixture(scope="module")
def fake_llm(tiny_facts):
    config = EngineConfig.from_fields(
        model=str(tiny_facts), device="cpu", executor="fake", max_model_len=128, max_num_seqs=4,
        max_num_batched_tokens=32,
    )  # fmt: skip
    with LLM.from_config(config, executor=FakeExecutor(num_blocks=64)) as llm:
        yield llm


GREEDY = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)


def test_one_conversation_or_several(fake_llm):
    one = fake_llm.chat(CONVERSATIONS["one picture"], GREEDY, use_tqdm=False)
    assert len(one) == 1
    assert one[0].prompt == "USER: <image>\nWhat is it? ASSISTANT:"
    assert one[0].prompt_token_ids.count(TINY_IMAGE_ID) == TINY_IMAGE_TOKENS
    several = fake_llm.chat(
        [CONVERSATIONS["one picture"], CONVERSATIONS["string"]], [GREEDY, GREEDY], add_generation_prompt=False,
        use_tqdm=False,
    )  # fmt: skip
    assert [output.prompt for output in several] == ["USER: <image>\nWhat is it? ", "USER: What is a cat? "]
    (other,) = fake_llm.chat(CONVERSATIONS["string"], GREEDY, chat_template=STRINGS, use_tqdm=False)
    assert other.prompt == "[user] What is a cat?</s>"


def test_a_wrong_conversation_fails_alone_among_several_and_raises_by_itself(fake_llm):
    large = Image.new("1", (9_000, 9_000))
    wrong = [
        ([], "messages is empty"),
        ([{"role": "bot", "content": "x"}], "messages[0].role = 'bot'"),
        (user({"type": "image_url", "image_url": {"url": "http://a/b.png"}}), "is not fetched here"),
        (user(cut_off(data_url(noise())), text("hi")), "damaged or truncated"),
        (user({"type": "image", "image": large}), "81000000 pixels; at most 67108864"),
        (user(data_url(large)), "messages[0].content[0]: 9000x9000 is 81000000 pixels"),
        (user(text("word " * 200)), "at most 127"),
    ]
    good = CONVERSATIONS["turns"]
    outputs = fake_llm.chat([good, *(messages for messages, _ in wrong), good], GREEDY, use_tqdm=False)
    assert [output.error for output in (outputs[0], outputs[-1])] == [None, None]
    for output, (messages, message) in zip(outputs[1:-1], wrong, strict=True):
        assert message in str(output.error)
        with pytest.raises(ValueError) as error:  # noqa: PT011
            fake_llm.chat(messages, GREEDY, use_tqdm=False)
        assert message in str(error.value)
    with pytest.raises(PictureError):
        fake_llm.chat(wrong[2][0], GREEDY, use_tqdm=False)


def test_a_wrong_template_raises_whatever_the_number(fake_llm, monkeypatch):
    for messages in (CONVERSATIONS["string"], [CONVERSATIONS["string"]] * 2):
        with pytest.raises(ValueError, match="chat_template is not Jinja"):
            fake_llm.chat(messages, GREEDY, chat_template="{% for %}", use_tqdm=False)
    monkeypatch.setattr(fake_llm.get_tokenizer(), "chat_template", None)
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        fake_llm.chat([CONVERSATIONS["string"]] * 2, GREEDY, use_tqdm=False)


def test_a_prompt_too_long_is_refused_before_its_pictures_are_decoded(fake_llm):
    with pytest.raises(ValueError, match="tokens long"):
        fake_llm.chat(user(cut_off(data_url(noise())), text("word " * 200)), GREEDY, use_tqdm=False)


def test_the_demo_answers_its_questions():
    questions = json.loads((PICTURES / "questions.json").read_text())
    conversations = []
    for index, one in enumerate(questions):
        picture = Image.open(PICTURES / one["image"])
        part = {"type": "image", "image": picture} if index % 2 else data_url(picture)
        conversations.append(user(part, text(one["question"])))
    with LLM(str(DEMO), executor="inline", device="cpu", dtype="float32", kv_cache_memory_gib=0.125) as llm:
        outputs = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=64), use_tqdm=False)
    assert [output.error for output in outputs] == [None] * len(questions)
    assert [output.outputs[0].text.strip() for output in outputs] == [one["answer"] for one in questions]
    assert [output.prompt for output in outputs] == [one["prompt"] for one in questions]


def test_pictures_in_two_turns_are_answered_as_by_transformers(tiny_checkpoint):
    first, second = noise(1), noise(2)
    messages = [
        *user({"type": "image", "image": first}, text("Look.")),
        {"role": "assistant", "content": "Yes."},
        *user(data_url(second), text("Which is brighter?")),
    ]
    with LLM(str(tiny_checkpoint), executor="inline", device="cpu", max_model_len=128, max_num_seqs=4) as llm:
        (output,) = llm.chat(messages, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    prompt = "USER: <image>\nLook. ASSISTANT: Yes. USER: <image>\nWhich is brighter? ASSISTANT:"
    assert output.prompt == prompt
    assert output.outputs[0].token_ids == reference_for(tiny_checkpoint).greedy(prompt, [first, second], 12)

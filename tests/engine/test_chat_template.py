from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from dist_vlm.engine.chat_template import ChatTemplates, ContentForm, TemplateRefusalError

from . import small_tokenizers

PART = "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}"
LOOP = "{% for m in messages %}" + PART + "{% endfor %}"
STRINGS, PARTS, BOTH = ContentForm(True, False), ContentForm(False, True), ContentForm(True, True)


@pytest.fixture(scope="module")
def demo():
    return PreTrainedTokenizerFast.from_pretrained("examples/demo/checkpoint")


@pytest.fixture
def bare():
    """A tokenizer without a chat template."""
    return small_tokenizers.metaspace()


def render(tokenizer, template, messages, **options):
    settings = {"tools": None, "add_generation_prompt": True, "template_kwargs": {}, **options}
    return ChatTemplates(tokenizer).render(template, messages, **settings)


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", STRINGS),
        ("{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}", STRINGS),
        ("{% for m in messages %}{{ m['content'] | trim }}{% endfor %}", STRINGS),
        ("{% for m in messages %}{{ m.content.strip() }}{% endfor %}", STRINGS),
        ("{% for m in messages %}{{ m.content | tojson }}{% endfor %}", STRINGS),
        ("{% macro show(c) %}[{{ c }}]{% endmacro %}{% for m in messages %}{{ show(m.content) }}{% endfor %}", STRINGS),
        (LOOP, PARTS),
        # A part's text in quotes is not a list as it is.
        (LOOP.replace("{{ c.text }}", "{{ c.text | tojson }}"), PARTS),
        (
            "{% macro show(x) %}{% if x is string %}{{ x }}{% else %}{% for c in x %}{{ c.text }}{% endfor %}"
            "{% endif %}{% endmacro %}{% for m in messages %}{% set x = m.content %}{{ show(x) }}{% endfor %}",
            BOTH,
        ),
        # Asks for a system message: contents go as they are given.
        ("{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[1].content }}", BOTH),
    ],
)
def test_the_form_of_contents_is_found(bare, template, form):
    assert ChatTemplates(bare).form(template) == form


def test_the_demos_template_takes_both(demo):
    assert ChatTemplates(demo).form(demo.chat_template) == BOTH


def test_a_template_is_the_argument_or_the_tokenizers(demo, bare):
    assert ChatTemplates(demo).resolve(None, None) == demo.chat_template
    assert ChatTemplates(demo).resolve("{{ 1 }}", None) == "{{ 1 }}"
    with pytest.raises(ValueError, match="chat_template = None, and the tokenizer has no chat template: pass one"):
        ChatTemplates(bare).resolve(None, None)
    with pytest.raises(ValueError, match="chat_template of type int"):
        ChatTemplates(bare).resolve(5, None)


def test_a_template_is_found_by_its_name(bare):
    bare.chat_template = {"default": "D", "tool_use": "T {{ tools }}", "other": "O"}
    templates = ChatTemplates(bare)
    assert templates.resolve(None, None) == "D"
    assert templates.resolve(None, [{}]) == "T {{ tools }}"
    assert templates.resolve("other", None) == "O"
    bare.chat_template = {"one": "1", "two": "2"}
    with pytest.raises(ValueError, match="must be one of one, two"):
        templates.resolve(None, None)


def test_a_default_comes_before_the_tokenizers_own(demo, bare):
    assert ChatTemplates(demo, "D").resolve(None, None) == "D"
    assert ChatTemplates(demo, "D").resolve("{{ 1 }}", None) == "{{ 1 }}"
    assert ChatTemplates(bare, "D").resolve(None, None) == "D"
    with pytest.raises(ValueError, match="no place for them"):
        ChatTemplates(demo, "D").resolve(None, [{"type": "function"}])


def test_whether_there_is_a_default(demo, bare):
    assert ChatTemplates(demo).has_default
    assert ChatTemplates(bare, "D").has_default
    assert not ChatTemplates(bare).has_default
    bare.chat_template = {"one": "1"}
    assert not ChatTemplates(bare).has_default
    assert ChatTemplates(bare, "D").has_default
    bare.chat_template = {"tool_use": "1"}
    assert ChatTemplates(bare).has_default


def test_tools_that_a_template_would_drop_are_refused(demo):
    with pytest.raises(ValueError, match="no place for them"):
        ChatTemplates(demo).resolve(None, [{"type": "function"}])
    assert ChatTemplates(demo).resolve(None, []) == demo.chat_template


def test_names_reach_the_template(bare):
    template = "{{ bos_token }}{{ mood }}{{ tools[0].name }}{{ add_generation_prompt }}{{ messages[0].content }}"
    text = render(
        bare, template, [{"role": "user", "content": "x"}], tools=[{"name": "t"}], template_kwargs={"mood": "m"}
    )
    assert text == "<s>mtTruex"


def test_errors_say_whose_they_are(bare):
    with pytest.raises(ValueError, match="chat_template is not Jinja: line 2"):
        ChatTemplates(bare).form("a\n{% for %}")
    with pytest.raises(TemplateRefusalError, match="refuses the messages: roles must take turns"):
        render(bare, "{{ raise_exception('roles must take turns') }}", [{"role": "user", "content": "x"}])
    for template in ("{{ messages[3].content.x }}", "{{ messages[0].content + 1 }}", "{{ messages.append(1) }}"):
        with pytest.raises(ValueError, match=r"cannot render the messages \(\w+\)$"):
            render(bare, template, [{"role": "user", "content": "secret"}])


def test_a_template_cannot_leave_its_sandbox(bare):
    with pytest.raises(ValueError, match=r"\(SecurityError\)"):
        render(bare, "{{ ''.__class__.__mro__ }}", [{"role": "user", "content": "x"}])

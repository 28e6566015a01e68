"""Chat templates: which one a folder has, what it renders, and what it cannot do."""

import json

import pytest

from dsv3.data import ChatTemplate, load_chat_template, render_chat, save_tokenizer, train_tokenizer
from dsv3.data.default_template import DEFAULT_CHAT_TEMPLATE
from dsv3.data.tokenizer import BOS, EOS

USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
ASKED = [{"role": "user", "content": "Hi"}]


def said(content, **more):
    return {"role": "assistant", "content": content, **more}


@pytest.mark.parametrize(
    "messages, text",
    [
        ([*ASKED], f"{BOS}{USER}Hi"),
        ([{"role": "system", "content": "Be\n"}, *ASKED, said(" Ho ")], f"{BOS}Be\n{USER}Hi{ASSISTANT} Ho {EOS}"),
        ([*ASKED, said("<think>x</think>\n\nHo")], f"{BOS}{USER}Hi{ASSISTANT}<think>x</think>\n\nHo{EOS}"),
        (
            [*ASKED, said("<think>x</think>\n\nHo"), *ASKED, said("He", reasoning="y")],
            f"{BOS}{USER}Hi{ASSISTANT}\n\nHo{EOS}{USER}Hi{ASSISTANT}<think>\ny\n</think>\n\nHe{EOS}",
        ),
        ([*ASKED, said("He", reasoning_content="y"), *ASKED], f"{BOS}{USER}Hi{ASSISTANT}He{EOS}{USER}Hi"),
    ],
)
def test_the_default_template(messages, text):
    assert render_chat(ChatTemplate(), messages) == text
    assert render_chat(ChatTemplate(), messages, add_generation_prompt=True) == text + ASSISTANT


@pytest.mark.parametrize(
    "messages", [[*ASKED, {"role": "tool", "content": "x"}], [*ASKED, said("x", tool_calls=[{"type": "function"}])]]
)
def test_the_default_template_has_no_tools(messages):
    with pytest.raises(ValueError, match="dsv3's chat template refuses the messages: there is no place for tools"):
        render_chat(ChatTemplate(), messages)


def test_what_a_template_is_given():
    template = ChatTemplate(
        "{{ bos_token }}{% generation %}{{ messages[0]['content'] | tojson }}{% endgeneration %}\n"
        "{% for tool in tools %}{% if loop.index > 1 %}{% break %}{% endif %}{{ tool.name }}{% endfor %}"
        "{{ strftime_now('%Y') | length }}{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}"
        "{{ add_generation_prompt }}{{ 'ab' * 2 }}{{ 99 ** 3 }}",
        {"bos_token": "<s>", "eos_token": "</s>"},
    )
    given = {"tools": [{"name": "one"}, {"name": "two"}]}
    assert render_chat(template, [{"role": "user", "content": "<é>"}], **given) == '<s>"<é>"one42Falseabab970299'


@pytest.mark.parametrize(
    "source, message",
    [
        ("{% if %}", r"does not parse \(line 1: Expected an expression"),
        ("{{ raise_exception('no way') }}", "refuses the messages: no way"),
        ("\n{{ messages[7].content }}", r"fails \(line 2\): UndefinedError: "),
        ("{{ messages[0]['content'] + 1 }}", r"fails \(line 1\): TypeError: "),
        ("{{ ''.__class__.__mro__ }}", r"forbids \(line 1\): attribute '__class__' of a str"),
        ("x{{ ''.__class__ }}", "tries what its sandbox forbids"),
        ("{{ messages.append(1) }}", "tries what its sandbox forbids"),
        ("{{ messages[0].update(role='x') }}", "tries what its sandbox forbids"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "tries what its sandbox forbids"),
        ("{{ '{0.__class__}'.format(1) }}", "tries what its sandbox forbids"),
        ("{% set n = namespace() %}{% set n.__init__ = 1 %}", "forbids.*: name '__init__' of a namespace"),
        ("{{ namespace(_x=1) }}", "forbids.*: name '_x' of a namespace"),
        ("{{ 'a' * 10000000000 }}", r"forbids \(line 1\): `\*` of something as large as 10000000000"),
        ("{{ 9 ** 9 ** 9 }}", r"forbids \(line 1\): `\*\*` of something"),
        ("{{ 3 ** 65 }}", r"forbids \(line 1\): `\*\*` of something as large as 65"),
        ("{% for i in range(10000000) %}{% endfor %}", r"fails \(line 1\): OverflowError: Range too big"),
        ("{% include '/etc/passwd' %}", r"fails \(line 1\): TypeError: no loader"),
    ],
)
def test_a_template_that_fails_or_breaks_out_is_one_line(source, message):
    with pytest.raises(ValueError, match=message) as caught:
        render_chat(ChatTemplate(source, where="mine"), ASKED)
    text = str(caught.value)
    assert text.startswith("render_chat: mine ") and "\n" not in text


def test_messages_are_values_and_stay_as_they_are():
    class Loaded(str):
        pass

    with pytest.raises(ValueError, match="render_chat: `messages` hold a Loaded, want JSON values"):
        render_chat(ChatTemplate(), [{"role": "user", "content": Loaded("Hi")}])
    message = said("Ho", reasoning="y")
    render_chat(ChatTemplate(), [*ASKED, message])
    assert message == said("Ho", reasoning="y")


def test_which_template_a_folder_has(tmp_path):
    config = tmp_path / "tokenizer_config.json"
    assert load_chat_template(tmp_path) is None
    config.write_text(json.dumps({"eos_token": {"content": "</s>"}, "bos_token": None, "add_bos_token": True}))
    assert load_chat_template(tmp_path) is None
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d{{ eos_token }}"}]
    config.write_text(json.dumps({"chat_template": "x"}))
    assert load_chat_template(tmp_path).eos == EOS
    config.write_text(json.dumps({"eos_token": {"content": "</s>"}, "chat_template": named}))
    template = load_chat_template(tmp_path)
    assert render_chat(template, ASKED) == "d</s>" and template.eos == "</s>" and template.tokens["bos_token"] == BOS
    assert str(tmp_path) in template.where
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load_chat_template(tmp_path).source == "file"


def test_folders_that_are_refused(tmp_path):
    config, file = tmp_path / "tokenizer_config.json", tmp_path / "chat_template.jinja"
    with pytest.raises(FileNotFoundError, match="load_chat_template: '.*nowhere' is no folder"):
        load_chat_template(tmp_path / "nowhere")
    for content, message in [
        ("{", "'.*config.json' is not JSON"),
        ("[]", "'.*config.json' holds a list, want an object"),
        ('{"chat_template": 3}', "the chat template of '.*' is a int, want a string"),
        ('{"chat_template": [{"name": "rag", "template": "r"}]}', "has the names 'rag', want one named 'default'"),
        ('{"chat_template": "{% if"}', r"the chat template of '.*' does not parse \(line 1"),
    ]:
        config.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_chat_template(tmp_path)
    config.unlink()
    file.write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match=r"'.*jinja' is not UTF-8 \(byte 2\)"):
        load_chat_template(tmp_path)


def test_a_saved_tokenizer_brings_its_template(tmp_path):
    tokenizer = train_tokenizer(["a"], 300)
    save_tokenizer(tokenizer, tmp_path / "own")
    assert load_chat_template(tmp_path / "own").source == DEFAULT_CHAT_TEMPLATE
    save_tokenizer(tokenizer, tmp_path / "given", chat_template="mine")
    assert load_chat_template(tmp_path / "given").source == "mine"

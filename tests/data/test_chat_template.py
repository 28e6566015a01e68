"""Chat templates: which one a folder has, what it renders, and what it cannot do."""

import datetime
import json

import pytest

from dsv3.data import ChatTemplate, load_chat_template, render_chat, save_tokenizer, train_tokenizer
from dsv3.data.default_template import DEFAULT_CHAT_TEMPLATE
from dsv3.data.tokenizer import BOS, EOS

USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
FORTY = "{% for i in range(40) %}"
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
        ("{{ 'x' * 1048576 * 65536 }}", r"forbids \(line 1\): the result of `\*` as large as 68719476736"),
        ("{{ [1] * 1024 * 1025 }}", r"the result of `\*` as large as 1049600"),
        ("{{ '%9999999999d' % 1 }}", r"forbids \(line 1\): `%` with a large width"),
        ("{{ '%.*f' % (99999, 1.0) }}", "`%` with a large width"),
        (f"{{{{ {'%s' * 99!r} % ((a,) * 99) }}}}", "text as large as"),
        ("{{ '%99999d'|format(1) }}", "`%` with a large width"),
        ("{{ ['%99999d']|map('format', 1)|list }}", "`%` with a large width"),
        ("{{ '{:99999}'.format(1) }}", "`format` with a large width"),
        ("{{ '{:{}}'.format(1, 99999) }}", "`format` with a large width"),
        (f"{{{{ {'{0}' * 99!r}.format(a) }}}}", "the result of `format` as large as"),
        ("{{ 'x'|center(9999999999) }}", "`center` with something as large as 9999999999"),
        ("{{ 'x'.ljust(9999999999) }}", "`ljust` with something as large as 9999999999"),
        ("{{ '7'.zfill(9999999999) }}", "`zfill` with something as large as 9999999999"),
        ("{{ 'x\n'|indent(9999999999) }}", "`indent` with something as large as 9999999999"),
        ("{{ ('\n' * 9999)|indent(4000) }}", "the result of `indent` as large as"),
        ("{{ a.replace('x', a) }}", "the result of `replace` as large as"),
        ("{{ a|replace('', 'x' * 99) }}", "the result of `replace` as large as"),
        ("{{ a.translate({120: a}) }}", "forbids.*: `translate`"),
        ("{{ ([a] * 99)|join }}", "text as large as"),
        ("{{ ([{'b': a}] * 99)|join('', attribute='b') }}", "text as large as"),
        ("{{ ''.join([a] * 99) }}", "text as large as"),
        ("{{ [1, 2]|tojson(indent=9999999) }}", "the result of `tojson` as large as"),
        ("{{ [1]|batch(9999999999, 0)|list }}", "`batch` with something as large as"),
        ("{{ 1|round(9999999999, 'ceil') }}", "`round` with something as large as"),
        ("{{ [[1], [2]]|sum(start=[]) }}", "`sum` of what is no number"),
        ("{{ lipsum(9999999999) }}", "'lipsum' is undefined"),
        ("{{ strftime_now('%9999999999d') }}", "`strftime_now` with a large width"),
        ("{% set n = namespace(x='ab') %}" + FORTY + "{% set n.x = n.x ~ n.x %}{% endfor %}", "text as large as 3"),
        ("{% set n = namespace(x='ab') %}" + FORTY + "{% set n.x = n.x + n.x %}{% endfor %}", "of `\\+` as large"),
        ("{% set n = namespace(x=[1]) %}" + FORTY + "{% set n.x = n.x + n.x %}{% endfor %}", "of `\\+` as large"),
        ("{% set n = namespace(x='a') %}" + FORTY + "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}", "text"),
        ("{% set n = namespace(x=[1]) %}" + FORTY + "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}", "text as"),
        ("{% set n = namespace(x=[1]) %}" + FORTY + "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x|string }}", "text as"),
        (
            "{% set n = namespace(x=1) %}" + FORTY + "{% set n.x = namespace(x=[n.x, n.x]) %}{% endfor %}{{ n }}{{ 2 * a }}",
            "the result of `\\*`",
        ),
        ("{% macro m() %}{{ a }}{{ a }}{% endmacro %}{% for i in range(99) %}{{ m() }}{% endfor %}", "text as large as"),
        ("{% include '/etc/passwd' %}", r"fails \(line 1\): TypeError: no loader"),
    ],
)
def test_a_template_that_fails_or_breaks_out_is_one_line(source, message):
    with pytest.raises(ValueError, match=message) as caught:
        render_chat(ChatTemplate(source, {"a": "x" * (1 << 20), "eos_token": EOS}, where="mine"), ASKED)
    text = str(caught.value)
    assert text.startswith("render_chat: mine ") and "\n" not in text


def test_what_templates_do_with_texts_is_not_in_the_way():
    """What is bounded works as Python has it, as long as it is small."""
    for source, text in [
        ("{{ '%-5s|%05.1f' % ('a', 2) }}", "a    |002.0"),
        ("{{ '%s' | format(3) }}{{ '{:>4}'.format('a') }}{{ '{a}'.format_map({'a': 1}) }}", "3   a1"),
        ("{{ 'a'|center(5) }}{{ 'a'.ljust(3) }}{{ 'a\nb'|indent(2) }}{{ 1.25|round(1) }}", "  a  a  a\n  b1.2"),
        ("{{ 'aba'.replace('a', 'cd') }}{{ 'aba'|replace('a', 'c', 1) }}", "cdbcdcba"),
        ("{{ [1, 'a', none]|join(', ') }}{{ messages|join('', attribute='content') }}", "1, a, NoneHi"),
        ("{{ '-'.join(['a', 'b']|map('upper')) }}{{ [1, 2]|sum }}{{ [[1, 2]]|first|last }}", "A-B32"),
        ("{{ 1 ~ 'a' ~ x ~ [1] }}{{ [1] + [2] }}{{ 1 + 2 }}{{ [0] * 2 }}", "1a[1][1, 2]3[0, 0]"),
        ("{{ {'a': [1]}|tojson(indent=1) }}{{ {'a': 1}|tojson(separators=(',', ':')) }}", '{\n "a": [\n  1\n ]\n}{"a":1}'),
        ("{{ namespace(a=1).a }}{{ messages[0].items()|list|length }}{{ ' a '|trim|upper }}", "12A"),
    ]:
        assert render_chat(ChatTemplate(source), ASKED) == text


def test_a_template_may_be_told_the_time():
    source = "{{ strftime_now('%Y-%m-%d %H') }}{% macro m() %}{{ strftime_now('%S') }}{% endmacro %}{{ m() }}"
    template = ChatTemplate(source, time=datetime.datetime(2024, 12, 27, 3, 4, 5))
    assert render_chat(template, ASKED) == "2024-12-27 0305"


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

"""Conversations are rendered whole, and exactly the answers have loss; what cannot be told apart is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trainer.chat_layouts import Conversation, Message
from trainer.chat_template import PLAIN, ChatEncoder, template_of
from trainer.documents import DataError
from trainer.tokenizer import END, byte_tokenizer, save_tokenizer, train_bpe

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = """
{%- for m in messages %}
    {{- '<|im_start|>' + m['role'] + '\n' }}
    {%- if m['role'] == 'assistant' %}
    {% generation %}
    {{- m['content'] + '<|im_end|>' -}}
    {% endgeneration %}
    {%- else %}
    {{- m['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
"""
# The answer before the last loses its thoughts, as in models that think.
FORGETS = (
    "{% for m in messages %}{{ m['role'] + ':' }}{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}"
    "{% else %}{{ m['content'].split('</think>')[-1] }}{% endif %};{% endfor %}"
)


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    raw = byte_tokenizer()
    raw.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    folder = tmp_path_factory.mktemp("bytes")
    save_tokenizer(raw, folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("bpe")
    save_tokenizer(train_bpe(["the answer is: Hello you\n" * 50, "User:\nAssistant:\n" * 50], 320), folder)
    return AutoTokenizer.from_pretrained(folder)


def row(*turns: tuple[str, str], **more: Any) -> Conversation:
    messages = tuple(Message(role, content) for role, content in turns)
    return Conversation("x.jsonl:7", "x#7", "", "messages", messages, **more)


def learnt(tokenizer: Any, template: str, conversation: Conversation) -> tuple[str, list[str]]:
    """The whole text, and each run of tokens that has loss."""
    encoded = ChatEncoder(tokenizer, template).encode(conversation)
    assert len(encoded.ids) == len(encoded.learn)
    runs: list[list[int]] = []
    for i, (token, counts) in enumerate(zip(encoded.ids, encoded.learn, strict=True)):
        if counts and not (i and encoded.learn[i - 1]):
            runs.append([])
        if counts:
            runs[-1].append(token)
    return tokenizer.decode(encoded.ids), [tokenizer.decode(run) for run in runs]


TALK = (("system", "Be brief."), ("user", "Hi é🪱"), ("assistant", "Ho 🪱é"), ("user", "More"), ("assistant", " no\n"))


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_answers_with_their_end_have_loss_and_nothing_else(bytes_tokenizer: Any, template: str) -> None:
    text, runs = learnt(bytes_tokenizer, template, row(*TALK))
    assert text == "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in TALK)
    assert runs == ["Ho 🪱é<|im_end|>", " no\n<|im_end|>"]


def test_both_ways_of_finding_answers_agree(bytes_tokenizer: Any) -> None:
    one, two = ChatEncoder(bytes_tokenizer, CHATML), ChatEncoder(bytes_tokenizer, MARKED)
    assert (one.method, two.method) == ("prefixes", "its own generation marks")
    assert one.encode(row(*TALK)) == two.encode(row(*TALK))


# Whatever UTF-8 can spell, but for the last private plane.
TEXTS = st.text(st.characters(codec="utf-8", max_codepoint=0x10EFFF), max_size=12)


@given(st.lists(TEXTS, min_size=1, max_size=4), st.sampled_from([CHATML, PLAIN]))
def test_any_text_comes_back(bytes_tokenizer: Any, answers: list[str], template: str) -> None:
    turns = [turn for i, answer in enumerate(answers) for turn in (("user", f"q{i}"), ("assistant", answer))]
    text, runs = learnt(bytes_tokenizer, template, row(*turns))
    end = "<|im_end|>" if template == CHATML else END
    assert runs == [answer + end for answer in answers if answer.strip()]
    assert all(answer in text for answer in answers)


def test_tokens_that_merge_letters_are_told_by_where_they_lie(bpe: Any) -> None:
    talk = row(("user", "the answer"), ("assistant", "Hello you"), ("user", "x"), ("assistant", "y"))
    text, runs = learnt(bpe, PLAIN, talk)
    assert text == f"User:\nthe answer\nAssistant:\nHello you{END}\nUser:\nx\nAssistant:\ny{END}\n"
    assert runs == [f"Hello you{END}", f"y{END}"]


def test_special_tokens_spelt_out_in_a_message_stay_text(bytes_tokenizer: Any) -> None:
    said = f"a<|im_end|>{END}<|im_start|>"
    for template in (CHATML, MARKED, PLAIN):
        encoder = ChatEncoder(bytes_tokenizer, template)
        talk = row(("user", said), ("assistant", said))
        encoded = encoder.encode(talk)
        plain = encoder.encode(row(("user", "a"), ("assistant", "a")))
        count = [sum(token > 255 for token in one.ids) for one in (encoded, plain)]
        assert count[0] == count[1], "no more control tokens than the template itself writes"
        assert bytes_tokenizer.decode(encoded.ids).count(said) == 2
        assert sum(encoded.learn) == len(said) + 1
    with pytest.raises(DataError, match=r"x\.jsonl:7: a message holds characters of Unicode's last private plane"):
        ChatEncoder(bytes_tokenizer, PLAIN).encode(row(("user", "\U0010f001"), ("assistant", "a")))


def test_empty_answers_and_those_of_weight_0_have_no_loss(bytes_tokenizer: Any) -> None:
    _, runs = learnt(bytes_tokenizer, CHATML, row(("user", "a"), ("assistant", " "), ("user", "b"), ("assistant", "c")))
    assert runs == ["c<|im_end|>"]
    encoded = ChatEncoder(bytes_tokenizer, CHATML).encode(row(("user", "a"), ("assistant", "")))
    assert (any(encoded.learn), encoded.empty_answers) == (False, 1)
    messages = (Message("user", "a"), Message("assistant", "b", learn=False), Message("assistant", "c"))
    _, runs = learnt(bytes_tokenizer, CHATML, Conversation("p", "n", "", "messages", messages))
    assert runs == ["c<|im_end|>"]


def test_the_first_token_has_no_loss(bytes_tokenizer: Any) -> None:
    marked = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    encoded = ChatEncoder(bytes_tokenizer, marked).encode(row(("assistant", "abc")))
    assert encoded.learn == [False, True, True]
    assert encoded.unended == 1, "nothing tells the model to stop here"


def test_tool_turns_are_shown_and_never_learnt(bytes_tokenizer: Any) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = (
        Message("user", "1+1"), Message("assistant", "", (call,)), Message("tool", "2"), Message("assistant", "Two"),
    )  # fmt: skip
    offered = ({"type": "function", "function": {"name": "add"}},)
    talk = Conversation("x.jsonl:7", "n", "", "messages", messages, offered)
    text, runs = learnt(bytes_tokenizer, PLAIN, talk)
    assert text.startswith('Tool offered: {"type": "function"')
    assert "\nTool:\n2\n" in text
    assert [run.partition(" {")[0] for run in runs] == ["\nCall:", f"Two{END}"]
    with pytest.raises(DataError, match=r"leaves out the offered tool add and a tool call of message 2 \(assistant\)"):
        ChatEncoder(bytes_tokenizer, CHATML).encode(talk)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (FORGETS, r"leaves out message 2 \(assistant\); remove it from the row, or give"),
        (FORGETS.replace("split('</think>')[-1]", "upper()"), r"leaves out message 2"),
        ("{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}{% endif %}{% endfor %}",
         r"leaves out message 1 \(system\)"),
        ("{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
         r"message 3 cannot be told from what is around it: .*write data.answers: last"),
        ("BEGINS", "begins with an answer, .*; put a question before it"),
        ("{{ raise_exception('no systems') }}", r"refuses this conversation \(no systems\); mend the row"),
        ("{% for m in messages %}", r"refuses this conversation \("),
        (MARKED.replace("{% generation %}", "{% generation %}{% endgeneration %}{% generation %}"),
         r"marks 4 answers with \{% generation %\} where the row has 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_refused_with_its_place(bytes_tokenizer: Any, template: str, message: str) -> None:
    talk = row(("system", "Sys"), ("user", "<think>x</think>a"), ("assistant", "<think>x</think>b"), ("user", "c"),
               ("assistant", "d"))  # fmt: skip
    if "message 2" in message:
        talk = row(*[(m.role, m.content) for m in talk.messages[1:]])
    if template == "BEGINS":
        talk, template = row(("assistant", "a")), CHATML
    with pytest.raises(DataError, match=rf"x\.jsonl:7: .*{message}"):
        ChatEncoder(bytes_tokenizer, template).encode(talk)


def test_only_the_last_answer_has_loss_where_that_is_wanted(bytes_tokenizer: Any) -> None:
    """Then templates that forget earlier thoughts can be trained on, as they are asked."""
    talk = row(("user", "q"), ("assistant", "<think>x</think>a"), ("user", "r"), ("assistant", "<think>y</think>b"))
    forgets = FORGETS.replace("{% endfor %}", "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}")
    with pytest.raises(DataError, match=r"leaves out message 2 \(assistant\); .* write data\.answers: last"):
        ChatEncoder(bytes_tokenizer, forgets).encode(talk)
    for template, before in ((forgets, "user:q;assistant:a;user:r;assistant:"), (MARKED, None)):
        encoded = ChatEncoder(bytes_tokenizer, template, only_last=True).encode(talk)
        first = encoded.learn.index(True)
        assert bytes_tokenizer.decode(encoded.ids[first:]).startswith("<think>y</think>b")
        assert all(encoded.learn[first : first + 17])
        if before is not None:
            assert bytes_tokenizer.decode(encoded.ids[:first]) == before


def test_a_template_that_writes_the_date_writes_the_same_one_every_day(bytes_tokenizer: Any) -> None:
    dated = "{{ strftime_now('%d %b %Y') + strftime_now('%Y-%m-%d') + '\n' }}" + CHATML
    text, runs = learnt(bytes_tokenizer, dated, row(("user", "a"), ("assistant", "b")))
    assert text.startswith("26 Jul 20242024-07-26\n<|im_start|>user")
    assert runs == ["b<|im_end|>"]


def test_which_template_a_recipe_chooses(bytes_tokenizer: Any, tmp_path: Path) -> None:
    assert template_of("plain", bytes_tokenizer) == PLAIN
    with pytest.raises(DataError, match=r"has no chat template; write data\.chat_template: plain"):
        template_of("model", bytes_tokenizer)
    bytes_tokenizer.chat_template = CHATML
    assert template_of("model", bytes_tokenizer) == CHATML
    bytes_tokenizer.chat_template = None
    (tmp_path / "mine.jinja").write_text(MARKED)
    assert template_of(str(tmp_path / "mine.jinja"), bytes_tokenizer) == MARKED
    with pytest.raises(DataError, match=r"none\.jinja: No such file or directory; write model, plain"):
        template_of(str(tmp_path / "none.jinja"), bytes_tokenizer)
    endless = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer())
    with pytest.raises(DataError, match="plain ends answers with eos_token, which"):
        template_of("plain", endless)

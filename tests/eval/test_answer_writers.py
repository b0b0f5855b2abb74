"""A model that answers, with and without a chat template, and commands that do."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from eval.answer_writers import AnswerWriter, CommandWriter, ModelWriter
from eval.choosing import Choosing, make_rule
from eval.decoding.speculate import Generation, decode
from eval.decoding.strategies import make_drafter
from eval.questions import Answer, Question, Unanswerable, question_of
from eval.regenerate import TURNS, answer
from eval.target import Target
from layerskip_model.chat import ChatTemplate, Rendered
from layerskip_model.errors import UserError
from layerskip_model.runner import Runner
from tests.chats import MARKED, PLAIN, SPACED, TRIMMING, UNSTABLE, byte_tokenizer, talk
from tests.tiny_models import tiny_model

CLOSE = PLAIN.replace("'ASSISTANT: '", "'ASSISTANT:'")  # it writes no space that these models never write
TURN_ENDS = {MARKED: "<|im_end|>", TRIMMING: "<|eot|>", CLOSE: "</s>"}
LETTERS = "abcdef"


def chat_target(template: str | None, allowed: tuple[str, ...] = ()) -> Target:
    """A random model of bytes, whose generation config knows the end of a text; it says `allowed` and LETTERS only."""
    tokenizer = byte_tokenizer(template=template, begins=True)
    names = tokenizer.get_vocab()
    model = tiny_model(vocab_size=len(names), max_position_embeddings=400)
    silent = sorted(id for name, id in names.items() if name not in (*allowed, *LETTERS))
    model.generation_config = GenerationConfig(eos_token_id=names["</s>"], suppress_tokens=silent)
    return Target("tiny", model, tokenizer, Runner(model))


def writer_of(target: Target, template: str | None, steps: int = 12, **settings: Any) -> ModelWriter:
    chat = None if template is None else ChatTemplate(target.tokenizer, template)
    strategy = settings.pop("strategy", "autoregressive")
    choosing = settings.pop("choosing", Choosing())
    return ModelWriter.make(target, chat, strategy, max_new_tokens=steps, choosing=choosing, **settings)


def answered(writer: AnswerWriter, *questions: Question) -> list[Any]:
    return [outcome.row for outcome in answer(list(enumerate(questions)), writer)]


TALKS = [question_of(f"{n}", talk(*["q" * n, "old"] * (n % 3 + 1))) for n in range(1, 7)]


WILD = Choosing(sample=True, temperature=4.0)  # so that answers differ, and end now and then


@pytest.mark.parametrize("template", list(TURN_ENDS), ids=["marked", "trimming", "plain"])
def test_recipes_learn_the_very_tokens_that_the_model_wrote(template: str) -> None:
    target = chat_target(template, (TURN_ENDS[template],))
    writer = writer_of(target, template, choosing=WILD)
    chat = ChatTemplate(target.tokenizer, template)
    answers = 0
    for number, row in enumerate(answered(writer, *TALKS)):
        (rendered,) = chat.render(row["messages"]) if row is not None else [Rendered([], [])]
        edges = [i for i in range(len(rendered.ids)) if rendered.answers[i] and not rendered.answers[i - 1]]
        for turn, start in enumerate(edges):
            (alone,) = decode(
                target.runner,
                make_drafter("autoregressive", target.runner),
                [rendered.ids[:start]],
                max_new_tokens=12,
                eos_token_ids=target.eos_token_ids,
                rule=make_rule(target, WILD),
                streams=[number + TURNS * turn],
            )
            stop = start + len(alone.tokens)
            assert rendered.ids[start:stop] == alone.tokens
            assert rendered.answers[start : stop + 1] == [True] * len(alone.tokens) + [False] * (
                stop < len(rendered.ids)
            )
            assert alone.finish_reason == "eos"
            answers += 1
    assert answers > len(TALKS)


def test_the_end_of_a_turn_ends_an_answer_though_the_checkpoint_does_not_know_it() -> None:
    target = chat_target(MARKED, ("<|im_end|>",))
    end, eos = (target.tokenizer.get_vocab()[name] for name in ("<|im_end|>", "</s>"))
    assert target.eos_token_ids == [eos]
    writer_of(target, MARKED)
    assert target.eos_token_ids == [eos, end]
    writer_of(target, MARKED)
    assert target.eos_token_ids == [eos, end]
    plain = chat_target(PLAIN)
    writer_of(plain, PLAIN)
    assert plain.eos_token_ids == [eos]


def test_any_batch_and_any_strategy_write_the_same() -> None:
    target = chat_target(MARKED, ("<|im_end|>",))
    writer = writer_of(target, MARKED, choosing=WILD)
    rows = answered(writer, *TALKS)
    assert [answer([pair], writer)[0].row for pair in enumerate(TALKS)] == rows
    assert len({str(row) for row in rows}) > 3
    continued = [question_of(f"{n}", "a" * n) for n in range(1, 5)]
    target.model.generation_config.suppress_tokens = None  # with six letters greedy texts are all alike
    plain = answered(writer_of(target, None), *continued)
    settings: dict[str, Any] = {"strategy": "self_speculative", "exit_layer": 2, "num_speculations": 3}
    assert answered(writer_of(target, None, **settings), *continued) == plain
    assert len({row["response"] for row in plain}) > 1


def test_a_cut_answer_has_no_half_characters() -> None:
    target = chat_target(None)
    writer = writer_of(target, None)
    ids = target.encode("aé", special_tokens=False)  # three bytes
    for number, reason, text in ((3, "length", "aé"), (2, "length", "a"), (2, "eos", "a\ufffd")):
        generation = Generation(ids[:number], reason)
        assert writer._answer(target.encode("b"), generation) == Answer(text, reason, number)


@pytest.mark.parametrize(
    ("template", "reason"),
    [(UNSTABLE, "otherwise than the same messages"), (SPACED, "has other tokens alone")],
)
def test_a_template_whose_answers_could_not_be_learnt_is_refused(template: str, reason: str) -> None:
    tokenizer = byte_tokenizer(("Ġ", "H"), template=template)
    model = tiny_model(vocab_size=len(tokenizer.get_vocab()))
    target = Target("tiny", model, tokenizer, Runner(model))
    with pytest.raises(UserError, match=f"chat template: .*{reason}"):
        writer_of(target, template)


def test_what_does_not_fit_is_told_apart() -> None:
    target = chat_target(PLAIN)
    writer = writer_of(target, PLAIN)
    requests: list[dict[str, Any]] = [
        {"messages": talk("a" * 400)},
        {"messages": talk("a")},
        {"messages": [{"role": "system", "content": "a"}]},
        {"prompt": "a" * 398},  # and <s>
        {"prompt": "a" * 399},
    ]
    found = writer.write(requests, range(5))
    full = "what is asked fills the model's context"
    assert [str(one) if isinstance(one, Unanswerable) else one.finish_reason for one in found] == [
        full,
        "length",
        "the chat template refuses it: no role system",
        "context",
        full,
    ]


def program(text: str) -> str:
    return shlex.join([sys.executable, "-c", text])


def test_a_command_answers_line_by_line() -> None:
    text = (
        "import json, sys\n"
        "for line in sys.stdin:\n"
        "    row = json.loads(line)\n"
        "    said = row['messages'][-1]['content']\n"
        "    print(json.dumps({'text': f'{said} é {row[\"max_tokens\"]}', 'finish_reason': 'stop'}))\n"
    )
    rows = answered(CommandWriter(program(text), 7), *TALKS[:2])
    assert [row["messages"] for row in rows] == [
        talk("q", "q é 7", "q", "q é 7"),
        talk("qq", "qq é 7", "qq", "qq é 7", "qq", "qq é 7"),
    ]
    assert CommandWriter("missing", 7).write([], []) == []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("/no/such/program", "--command '/no/such/program' failed: .*No such file"),
        ("'", "--command ''' failed: No closing quotation"),
        (program("raise SystemExit(3)"), "non-zero exit status 3"),
        (program("print('{}')"), "wrote 1 lines for 2 requests"),
        (program("print('a'); print('b')"), "answer 1: not JSON"),
        (program("print('{\"text\": 1}'); print('b')"), r"answer 1 has keys \['text'\]; it needs"),
    ],
)
def test_a_command_that_fails_is_told(command: str, message: str) -> None:
    requests = [{"prompt": "a"}, {"prompt": "b"}]
    with pytest.raises(UserError, match=message):
        CommandWriter(command, 7).write(requests, [0, 1])


def test_the_job_changes_with_what_decides_the_answers(tmp_path: Path) -> None:
    target = chat_target(MARKED)
    target.model.save_pretrained(tmp_path)
    target = Target(str(tmp_path), target.model, target.tokenizer, target.runner)
    jobs = [
        writer_of(target, None).job,
        writer_of(target, MARKED).job,
        writer_of(target, None, 13).job,
        writer_of(target, None, strategy="self_speculative", exit_layer=1, num_speculations=2).job,
        writer_of(target, None, strategy="self_speculative", exit_layer=2, num_speculations=2).job,
        *(
            writer_of(target, None, choosing=Choosing(True, t, seed=s)).job
            for t, s in ((0.8, 0), (0.7, 0), (0.7, 1))
        ),
    ]
    assert len({str(sorted(job.items())) for job in jobs}) == len(jobs)
    assert len(jobs[0]["model"]) == 64

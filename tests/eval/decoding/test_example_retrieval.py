"""The worked example of CONTRIBUTING.md: short, lossless, and known to the whole program by its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval import Generator, Request, run_benchmark, write_report
from eval.decoding.speculate import Generation, decode
from eval.decoding.strategies import STRATEGIES, make_drafter
from eval.target import Target
from layerskip_model.errors import UserError
from layerskip_model.runner import Runner
from tests.eval.decoding import example_retrieval
from tests.eval.decoding.example_retrieval import Datastore, Retrieval
from tests.eval.decoding.sampled import sampled_model, sampling
from tests.eval.decoding.test_speculate import PROMPTS, naive_greedy
from tests.tiny_models import tiny_model

RUNNER = Runner(tiny_model())
NEW = 16
EXPECTED = [naive_greedy(RUNNER.model, prompt, NEW) for prompt in PROMPTS]
MISLED = [[*whole[:place], (whole[place] + 1) % 64, *whole[place:]] for whole in EXPECTED for place in (5, 9)]
STORE = Datastore("what it says, and not quite", [*EXPECTED[:2], *MISLED])


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a program of one's own does once; here it is taken back."""
    monkeypatch.setitem(STRATEGIES, "retrieval", Retrieval)


def run(prompts: list[list[int]], **settings: int) -> list[Generation]:
    drafter = make_drafter("retrieval", RUNNER, datastore=STORE, **settings)
    return decode(RUNNER, drafter, prompts, max_new_tokens=NEW, eos_token_ids=())


@pytest.mark.parametrize("settings", [{}, {"tree_tokens": 3}, {"num_speculations": 2}], ids=str)
def test_greedy_is_lossless_alone_and_in_a_batch(settings: dict[str, int]) -> None:
    together = run(PROMPTS, **settings)
    assert [row.tokens for row in together] == EXPECTED
    for row, prompt in zip(together, PROMPTS, strict=True):
        assert run([prompt], **settings)[0].accepted_lengths == row.accepted_lengths
    assert max(row.accepted_lengths[0] for row in together[:2]) > 2
    assert all(1 <= length <= 7 for row in together for length in row.accepted_lengths)


def test_the_tree_is_the_most_frequent_beginnings() -> None:
    """Of 1 2 (twice), 1 3 and 4 after the suffix 7 8: first 1, then 1 2, then 4 as the first of those seen once."""
    texts = [[7, 8, 1, 2], [9, 7, 8, 4], [7, 8, 1, 2], [7, 8, 1, 3], [8, 5, 5]]
    drafter = Retrieval(RUNNER, Retrieval.Settings(Datastore("small", texts), 2, 3))
    assert drafter._tree([0, 7, 8], 9) == [(8, -1, 0), (1, 0, 1), (2, 1, 2), (4, 0, 1)]
    assert drafter._tree([0, 7, 8], 2) == [(8, -1, 0), (1, 0, 1), (4, 0, 1)]
    assert drafter._tree([8], 9) == [(8, -1, 0), (1, 0, 1), (2, 1, 2), (4, 0, 1)]
    assert drafter._tree([60], 9) == [(60, -1, 0)]


def test_samples_are_those_of_autoregressive_sampling() -> None:
    runner = Runner(sampled_model())
    store = Datastore("pi", [[3, 1, 4, 1, 5, 0, 2, 0, 5, 3, 5], [5, 1, 0, 0], [5, 2, 4, 3, 5]])
    outputs = []
    for name, settings in (("autoregressive", {}), ("retrieval", {"datastore": store})):
        drafter = make_drafter(name, runner, **settings)
        rule = sampling({"temperature": 0.9, "top_p": 0.95})
        outputs.append(
            decode(runner, drafter, [[3, 1, 4]] * 300, max_new_tokens=8, eos_token_ids=(), rule=rule)
        )
    plain, drafted = ([row.tokens for row in rows] for rows in outputs)
    assert drafted == plain
    assert sum(row.accepted for row in outputs[1]) > 100


def test_settings_are_checked_as_those_of_every_strategy() -> None:
    with pytest.raises(UserError, match="retrieval needs datastore: a Datastore"):
        make_drafter("retrieval", RUNNER)
    with pytest.raises(UserError, match="datastore='texts' is not valid; give a Datastore"):
        make_drafter("retrieval", RUNNER, datastore="texts")
    with pytest.raises(UserError, match="tree_tokens=0 is not valid; give a whole number of 1 or more"):
        make_drafter("retrieval", RUNNER, datastore=STORE, tree_tokens=0)


def test_the_whole_program_takes_it(tiny_target: Target, tmp_path: Path) -> None:
    """Generator, benchmark and report, by no more than its name."""
    texts = [f"def anna_{i}(value):\n    return value + {i}\n\n" for i in range(5)]
    store = Datastore("five functions", [tiny_target.encode(text) for text in texts])
    generator = Generator.make(tiny_target, "retrieval", max_new_tokens=20, datastore=store)
    plain = Generator.make(tiny_target, max_new_tokens=20)
    prompts = ["def anna_1(value):\n", "def bert"]
    drafted = generator.generate(prompts)
    assert [row.tokens for row in drafted] == [row.tokens for row in plain.generate(prompts)]
    assert sum(row.accepted for row in drafted) > 0
    request = Request(["retrieval"], settings={"datastore": store}, max_steps=8, num_samples=2)
    report = run_benchmark(tiny_target, request)
    for strategies in (report.strategies, report.sampled):
        ours = next(strategy for strategy in strategies if strategy.name == "retrieval")
        assert ours.failed == 0
        assert ours.equal == ours.compared == 2
        assert ours.settings == {"datastore": "five functions", "num_speculations": 6, "tree_tokens": 12}
    write_report(report, tmp_path / "out")
    assert "five functions" in (tmp_path / "out" / "report.json").read_text()


def test_it_is_short() -> None:
    """What CONTRIBUTING.md promises."""
    assert len(Path(example_retrieval.__file__).read_text().splitlines()) < 80

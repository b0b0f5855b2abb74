"""Signatures against inspect's own reading of them."""

from __future__ import annotations

import inspect
import json

import pytest

from train.data.examples import Pair, Tolerance
from train.data.local import StdlibSource
from train.data.signatures import SignaturesSource, signatures
from train.data.sources import DataConfig, heldout_limit, split_documents

CODE = """
import x

class A:
    def plain(self): # no: the line does not end with its head
        pass
    def get(self, key, default="a, b", /, *rest, flag=(1, 2), must, **more):
        return 1
    async def wait(a: int = 1) -> None:
        pass
def one_line(): return 2
def several(
    a,
):
    pass
def ünï(ß="ß", b=[1]):
    pass
"""


def naive(head: str) -> dict[str, object]:
    """The same by running the definition."""
    space: dict[str, object] = {}
    exec(head.removeprefix("async ") + " pass", {}, space)
    ((name, function),) = space.items()
    assert callable(function)
    given = inspect.signature(function).parameters.values()
    names = [str(one).split(":")[0].split("=")[0].strip() for one in given]
    defaults = {one.name: one.default for one in given if one.default is not inspect.Parameter.empty}
    return {"name": name, "parameters": names, "defaults": defaults}


def test_says_what_python_reads() -> None:
    found = list(signatures(CODE.encode()))
    assert [head.split("(")[0] for head, _ in found] == ["def ünï", "def get", "async def wait"]
    for head, answer in found:
        said = json.loads(answer)
        said["defaults"] = {name: eval(text) for name, text in said["defaults"].items()}
        assert said == naive(head)


def test_a_file_that_does_not_parse_has_none() -> None:
    assert list(signatures(b"def broken(:\n    pass\n")) == []
    assert list(signatures(b"\x00")) == []


def test_equal_heads_of_the_standard_library_are_on_one_side(monkeypatch: pytest.MonkeyPatch) -> None:
    files = StdlibSource(kind="stdlib").paths()
    some = {name: files[name] for name in ("ast.py", "argparse.py", "inspect.py", "pydoc.py")}
    monkeypatch.setattr(StdlibSource, "paths", lambda self: some)
    config = DataConfig.model_validate({"train": [{"kind": "signatures"}], "heldout": 0.1})
    tolerance = Tolerance()
    split = split_documents(config, heldout_limit(config, tolerance), tolerance)
    training, heldout = ([one for one in part if isinstance(one, Pair)] for part in split)
    assert len(training) > 300
    assert 0.03 < len(heldout) / (len(training) + len(heldout)) < 0.2
    assert {one.prompt for one in training}.isdisjoint(one.prompt for one in heldout)
    assert all(one.prompt.endswith(":\n") and json.loads(one.response)["name"] for one in heldout)
    assert SignaturesSource(kind="signatures").whole

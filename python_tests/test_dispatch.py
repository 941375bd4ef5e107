"""explain: what it says, that it only says it, and that it leaves the ops of other threads alone."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from llada_kernels import explain, use_backend
from llada_kernels.ops import rms_norm, swiglu

X, WEIGHT = torch.ones(2, 8), torch.ones(8)


def test_explain_returns_the_table_and_prints_nothing(capsys):
    text = explain("rms_norm", X, WEIGHT)
    assert text.splitlines()[0] == "rms_norm:" and "  native     chosen" in text and "  reference  possible" in text
    assert "  reference  chosen" in explain(rms_norm, X, WEIGHT, backend="reference")
    with use_backend("reference"):
        assert "  reference  chosen" in explain(rms_norm, X, weight=WEIGHT)
    assert explain("rms_norm").count("listed") == 3
    assert capsys.readouterr().out == ""


def test_explain_checks_as_the_op_does():
    with pytest.raises(ValueError, match="weight: expected shape"):
        explain("rms_norm", X, torch.ones(7))
    with pytest.raises(ValueError, match="op: expected the name of an op of llada_kernels.ops, got 'norm'"):
        explain("norm", X)


def test_other_threads_go_on_while_one_explains(monkeypatch):
    module, results = sys.modules["llada_kernels.ops.rms_norm"], []
    check = module.check_tensor

    def in_the_middle(*args):
        monkeypatch.setattr(module, "check_tensor", check)
        with ThreadPoolExecutor(1) as other:
            results.append(other.submit(swiglu, X).result())
        results.append(swiglu(X))
        return check(*args)

    monkeypatch.setattr(module, "check_tensor", in_the_middle)
    assert "chosen" in explain("rms_norm", X, WEIGHT)
    assert len(results) == 2 and all(torch.equal(r, swiglu(X)) for r in results)

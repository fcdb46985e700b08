"""What `edgegt doctor` says about a machine, and that its answers are JSON."""

from __future__ import annotations

import json

import pytest
import torch

from edgegt.doctor import can_train, examine, findings_text
from edgegt.evaluate import held_out_loss
from edgegt.quant import BackendCheck
from tiny_models import CPU, FAMILIES, examples, float_model

FAILED = [BackendCheck("torch", False, "no kernel"), BackendCheck("bitsandbytes", False, "no library")]


def broken() -> None:
    raise RuntimeError("no float products either")


def test_this_machine_can_train() -> None:
    findings = examine()
    assert json.loads(json.dumps(findings, allow_nan=False))["ok"] is True
    working = [item["name"] for item in findings["backends"] if item["ok"]]
    assert findings["backend"] in working
    assert f"int8        {findings['backend']} is used" in findings_text(findings).splitlines()
    assert "int8        reference is used" in findings_text({**findings, "backend": "reference"}).splitlines()
    assert "cannot train" not in findings_text(findings)
    assert "edgegt cannot train here" in findings_text({**findings, "ok": False})


def test_a_machine_can_train_with_one_backend_or_with_float_products() -> None:
    assert can_train([*FAILED, BackendCheck("third", True)], CPU, reference=broken)
    assert can_train(FAILED, CPU)
    assert not can_train(FAILED, CPU, reference=broken)


def test_a_huge_loss_has_no_perplexity_and_stays_json() -> None:
    model = float_model(FAMILIES["llama-untied"]())
    small = held_out_loss(model, examples(3), 0, 4, CPU)
    assert small["perplexity"] == pytest.approx(2.718281828 ** small["loss"])
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    huge = held_out_loss(model, examples(3), 0, 4, CPU)
    assert huge["loss"] > 50 and huge["perplexity"] is None
    json.dumps(huge, allow_nan=False)

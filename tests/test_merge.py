"""Patches compared and averaged: what all have, what only some have, and rows of a head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from edgegt.cli import main
from edgegt.errors import InputError
from edgegt.merge import compare, merge, parse_weights
from edgegt.patch import apply_patch, open_patch, read_patch, save_patch
from edgegt.pretrained import Pretrained, open_pretrained
from tiny_models import FAMILIES, batch_of, load, logits_of, save_model

HEAD, UP, NORM = "lm_head.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("merge") / "model"
    save_model(found, FAMILIES["llama"]())
    return found


@pytest.fixture(scope="module")
def base(folder: Path) -> Pretrained:
    return open_pretrained(str(folder))


def patch(base: Pretrained, path: Path, seed: int, *names: str, **rows: torch.Tensor) -> Path:
    """Random values for these tensors; head: rows of the head that are trained."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(base.shapes[name], generator=draw) for name in names}
    if "head" in rows:
        tensors |= {HEAD: torch.randn(len(rows["head"]), 64, generator=draw), f"{HEAD}|rows": rows["head"]}
    save_patch(path, tensors, base.fingerprint, "model", "0", "\n")
    return path


def merged(paths: list[Path], base: Pretrained | None, weights: str | None = None) -> dict[str, torch.Tensor]:
    out = paths[0].parent / "merged"
    merge([open_patch(path) for path in paths], parse_weights(weights, len(paths)), base, out)
    return read_patch(out)[0]


def test_the_average_of_equals_is_the_same_and_of_others_the_mean(base: Pretrained, tmp_path: Path) -> None:
    one, two = patch(base, tmp_path / "1", 1, UP, NORM), patch(base, tmp_path / "2", 2, UP, NORM)
    first, second = read_patch(one)[0], read_patch(two)[0]
    assert all(torch.equal(value, first[name]) for name, value in merged([one, one, one], None).items())
    for weights, share in ((None, 0.5), ("0.7,0.3", 0.7), ("7,3", 0.7), ("1,0", 1.0)):
        found = merged([one, two], None, weights)
        expected = {
            name: (share * first[name].double() + (1 - share) * second[name].double()).float() for name in first
        }
        assert all(torch.allclose(found[name], expected[name], rtol=1e-6, atol=1e-7) for name in expected)
    _, about = read_patch(tmp_path / "merged")
    assert about["fingerprint"] == base.fingerprint and about["separator"] == "\n"


def test_what_a_patch_lacks_counts_as_the_base(base: Pretrained, tmp_path: Path) -> None:
    one, two = patch(base, tmp_path / "1", 1, UP), patch(base, tmp_path / "2", 2, NORM)
    with pytest.raises(InputError, match=rf"2' lacks '{UP}' or rows of it, .*give that base with --model"):
        merged([one, two], None)
    assert not (tmp_path / "merged").exists()
    found = merged([one, two], base, "0.25,0.75")
    assert torch.allclose(found[UP], 0.25 * read_patch(one)[0][UP] + 0.75 * base.value(UP), atol=1e-6)
    assert torch.allclose(found[NORM], 0.25 * base.value(NORM) + 0.75 * read_patch(two)[0][NORM], atol=1e-6)


def test_rows_of_a_head_are_united(base: Pretrained, tmp_path: Path) -> None:
    rows = torch.tensor([3, 5, 9]), torch.tensor([5, 7])
    one, two = (patch(base, tmp_path / str(seed), seed, head=index) for seed, index in enumerate(rows))
    first, second = (read_patch(path)[0][HEAD] for path in (one, two))
    with pytest.raises(InputError, match=r"lacks 'lm_head.weight' or rows of it"):
        merged([one, two], None)
    found, own = merged([one, two], base), base.value(HEAD)
    assert found[f"{HEAD}|rows"].tolist() == [3, 5, 7, 9]
    expected = torch.stack([first[0] + own[3], first[1] + second[0], own[7] + second[1], first[2] + own[9]]) / 2
    assert torch.allclose(found[HEAD], expected, atol=1e-6)
    same = merged([one, one], None)
    assert torch.equal(same[HEAD], first) and torch.equal(same[f"{HEAD}|rows"], rows[0])
    whole = patch(base, tmp_path / "3", 3, HEAD)
    found = merged([one, whole], base)
    assert f"{HEAD}|rows" not in found and found[HEAD].shape == (320, 64)
    trained = read_patch(whole)[0][HEAD]
    assert torch.allclose(found[HEAD][5], (first[1] + trained[5]) / 2, atol=1e-6)
    assert torch.allclose(found[HEAD][6], (own[6] + trained[6]) / 2, atol=1e-6)


def test_a_trained_embedding_is_the_head_of_a_tied_model_in_an_average_too(
    base: Pretrained, folder: Path, tmp_path: Path
) -> None:
    one, two = patch(base, tmp_path / "1", 1, EMBEDDING), patch(base, tmp_path / "2", 2, head=torch.tensor([4]))
    found, embedding = merged([one, two], base), read_patch(one)[0][EMBEDDING]
    assert torch.allclose(found[EMBEDDING], (embedding + base.value(EMBEDDING)) / 2, atol=1e-6)
    expected = (embedding + base.value(HEAD)) / 2
    expected[4] = (embedding[4] + read_patch(two)[0][HEAD][0]) / 2
    assert torch.allclose(found[HEAD], expected, atol=1e-6)


def test_an_average_works_on_its_base(base: Pretrained, folder: Path, tmp_path: Path) -> None:
    one, two = patch(base, tmp_path / "1", 1, UP, HEAD), patch(base, tmp_path / "2", 2, UP, HEAD)
    merged([one, two], None)
    model = load(folder, tmp_path / "cache")
    before = logits_of(model.module, batch_of(2))
    apply_patch(model, tmp_path / "merged")
    assert not torch.equal(logits_of(model.module, batch_of(2)), before)


def test_patches_of_different_bases_are_refused(base: Pretrained, folder: Path, tmp_path: Path) -> None:
    one, two = patch(base, tmp_path / "1", 1, UP), tmp_path / "2"
    save_patch(two, read_patch(one)[0], "e" * 64, "other", "0")
    with pytest.raises(InputError, match="were trained on different bases: give patches of one base"):
        merged([one, two], None)
    with pytest.raises(InputError, match="were trained on different bases"):
        compare(open_patch(one), open_patch(two), None)
    with pytest.raises(InputError, match="was trained on another base"):
        compare(open_patch(two), open_patch(two), base)


@pytest.mark.parametrize("text", ["0.7", "0.7,0.2,0.1", "1,-1", "0,0", "a,b", "nan,1", "inf,1", ""])
def test_weights_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="are not 2 numbers, none negative and not all 0: give one for each patch"):
        parse_weights(text, 2)


def entries(found: dict[str, Any]) -> dict[str, Any]:
    return {entry["name"]: entry for entry in found["tensors"]}


def test_differences_are_norms(base: Pretrained, tmp_path: Path) -> None:
    rows = torch.tensor([3, 5, 9]), torch.tensor([5, 7])
    one = patch(base, tmp_path / "1", 1, UP, NORM, head=rows[0])
    tensors = read_patch(one)[0]
    second = {NORM: tensors[NORM], UP: tensors[UP] + 2.0, HEAD: tensors[HEAD][1:] + 1.0, f"{HEAD}|rows": rows[1]}
    second["model.layers.1.mlp.up_proj.weight"] = base.value("model.layers.1.mlp.up_proj.weight") + 1.0
    save_patch(tmp_path / "2", second, base.fingerprint, "model", "0")
    alone = entries(compare(open_patch(one), open_patch(tmp_path / "2"), None))
    assert alone[NORM]["difference"] == 0.0
    assert alone[UP]["difference"] == pytest.approx(2 * (96 * 64) ** 0.5)
    assert alone[UP]["relative"] == pytest.approx(alone[UP]["difference"] / float(tensors[UP].norm()))
    assert alone[HEAD]["rows"] == 1 and alone[HEAD]["difference"] == pytest.approx(8)
    only = alone["model.layers.1.mlp.up_proj.weight"]
    assert only["in"] == "second" and only["difference"] is None
    whole = entries(compare(open_patch(one), open_patch(tmp_path / "2"), base))
    assert whole["model.layers.1.mlp.up_proj.weight"]["difference"] == pytest.approx((96 * 64) ** 0.5, rel=1e-5)
    own = base.value(HEAD)
    expected = torch.stack(
        [tensors[HEAD][0] - own[3], torch.ones(64), own[7] - second[HEAD][1], tensors[HEAD][2] - own[9]]
    )
    assert whole[HEAD]["rows"] == 4
    assert whole[HEAD]["difference"] == pytest.approx(float(expected.norm()), rel=1e-5)


def test_patches_that_do_not_fit_each_other_are_refused(base: Pretrained, tmp_path: Path) -> None:
    """Without their base nothing says which of them is right."""
    index = f"{HEAD}|rows"
    forms: list[dict[str, torch.Tensor]] = [
        {HEAD: torch.ones(10, 64)},
        {HEAD: torch.ones(10, 63)},
        {HEAD: torch.tensor(1.0)},
        {HEAD: torch.ones(2, 64), index: torch.tensor([4, 500])},
        {HEAD: torch.ones(2, 63), index: torch.tensor([4, 500])},
    ]
    paths = [tmp_path / str(number) for number in range(len(forms))]
    for path, tensors in zip(paths, forms, strict=True):
        save_patch(path, tensors, base.fingerprint, "model", "0")
    for one in paths:
        for two in paths:
            if one == two:
                assert entries(compare(open_patch(one), open_patch(two), None))[HEAD]["same"]
                continue
            with pytest.raises(InputError):
                merged([one, two], None)
            with pytest.raises(InputError):
                compare(open_patch(one), open_patch(two), None)


def test_classes_are_kept_and_patches_of_different_tasks_are_refused(base: Pretrained, tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(4)]
    for path, labels in zip(paths, ((), ("no", "yes"), ("no", "yes"), ("yes", "no")), strict=True):
        save_patch(path, {"score.weight": torch.ones(2, 64)}, base.fingerprint, "model", "0", labels=labels)
    merged(paths[1:3], None)
    assert open_patch(tmp_path / "merged").labels == ("no", "yes")
    for other in (paths[0], paths[3]):
        with pytest.raises(InputError, match="different tasks"):
            merged([paths[1], other], None)
        with pytest.raises(InputError, match="different tasks"):
            compare(open_patch(paths[1]), open_patch(other), None)


def test_rows_that_nothing_has_in_common_are_not_the_same(base: Pretrained, tmp_path: Path) -> None:
    rows = torch.tensor([3, 5, 9]), torch.tensor([7]), torch.tensor([3, 5])
    one, other, part = (patch(base, tmp_path / str(n), n, head=index) for n, index in enumerate(rows))
    found = entries(compare(open_patch(one), open_patch(other), None))[HEAD]
    assert found["rows"] == 0 and found["difference"] is None and not found["same"]
    tensors = read_patch(one)[0]
    save_patch(part, {HEAD: tensors[HEAD][:2], f"{HEAD}|rows": rows[2]}, base.fingerprint, "model", "0")
    found = entries(compare(open_patch(one), open_patch(part), None))[HEAD]
    assert found["difference"] == 0 and not found["same"]
    assert entries(compare(open_patch(one), open_patch(one), None))[HEAD]["same"]


def test_the_command_line_compares_and_averages(
    base: Pretrained, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = str(patch(base, tmp_path / "1", 1, UP, NORM)), str(patch(base, tmp_path / "2", 2, UP))
    assert main(["patch", "diff", one, two]) == 0
    said = capsys.readouterr().out
    assert "2 of 2 tensors differ, 0 are the same" in said and "unknown" in said and "--model" in said
    assert main(["patch", "diff", one, two, "--model", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert entries(found)[NORM]["difference"] > 0 and found["fingerprint"] == base.fingerprint
    assert main(["patch", "diff", one, one]) == 0
    assert capsys.readouterr().out == "0 of 2 tensors differ, 2 are the same\n"
    out = str(tmp_path / "out")
    assert main(["patch", "merge", one, two, "--output", out]) == 2
    assert capsys.readouterr().err.startswith(f"edgegt: patch '{two}' lacks '{NORM}'")
    words = ["patch", "merge", one, two, "--model", str(folder), "--weights", "3,1", "--output", out]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}\n" and printed.err == "2 tensors, the shares 0.75, 0.25\n"
    assert main(words) == 2
    assert "exists: give a new name, or --force" in capsys.readouterr().err
    assert main([*words, "--force", "--quiet"]) == 0
    for words, why in (
        (["patch"], "ACTION"),
        (["patch", "twist"], "invalid choice: 'twist'"),
        (["patch", "merge", one, "--output", "x"], "takes two patches or more, and got 1"),
        (["patch", "diff", one, str(tmp_path / "nothing")], "nothing' does not exist"),
        (["patch", "diff", one, two, "--jsn"], "--jsn"),
    ):
        capsys.readouterr()
        assert main(words) == 2
        said = capsys.readouterr().err
        assert why in said and said.count("\n") == 1 and said.startswith("edgegt: ")

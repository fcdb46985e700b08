"""A pretrained model's tensors by the names and in the shapes that a patch has them, each read when it is asked for.

The files may call a tensor otherwise, hold it transposed (GPT-2), hold it twice, or not at all (a tied head). Nothing
is quantised and no float model is made: names come from the architecture without weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from edgegt.architecture import is_linear, is_transposed, matrix_shape
from edgegt.cache import cache_dir
from edgegt.errors import InputError
from edgegt.model import names_in_files, outline, skeleton
from edgegt.patch import Patch
from edgegt.quant import index_fault
from edgegt.source import Source, fingerprint, open_source, read_config
from edgegt.units import format_text


@dataclass(frozen=True)
class Pretrained:
    """The base of patches. `files`: what its files call each parameter; `aliases`: the names of one and the same.

    tied: the head is the embedding's matrix. shapes: [out, in] of matrices; only `linears` can have trained rows.
    """

    source: Source
    config: Any
    fingerprint: str
    head: str
    embedding: str
    tied: bool
    files: Mapping[str, str]
    aliases: Mapping[str, tuple[str, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    transposed: frozenset[str]
    linears: frozenset[str]

    def value(self, name: str, rows: torch.Tensor | None = None) -> torch.Tensor:
        """A parameter as a patch has it, in the dtype of the files; of a tied head the embedding's. rows: only these.

        Raises: InputError when no file has it.
        """
        known = [self.files[alias] for alias in (name, *self.aliases.get(name, ())) if alias in self.files]
        if not known:
            raise self._unknown(name)
        found: torch.Tensor = self.source.tensor(known[0])
        found = found.t() if name in self.transposed else found
        return found if rows is None else found[rows]

    def places(self, name: str, apart: bool) -> list[str]:
        """The names in the files that a trained tensor goes to: its own and those of its aliases.

        apart: a tied head has values of its own, so that it is no alias of the embedding. A tied head may have none.
        Raises: InputError when no file has the tensor.
        """
        names = dict.fromkeys((name, *self.aliases.get(name, ())))
        if self.tied and apart:
            names = {name: None} if name == self.head else {one: None for one in names if one != self.head}
        found = [self.files[one] for one in names if one in self.files]
        if not found and not (self.tied and name == self.head):
            raise self._unknown(name)
        return list(dict.fromkeys(found))

    def _unknown(self, name: str) -> InputError:
        return InputError(
            f"'{format_text(name)}' has no tensor of that name in the files of '{self.source.name}', which may hold it "
            "in parts: such a patch cannot be exported yet, use it with --model and --patch"
        )

    def check(self, patch: Patch) -> None:
        """Whether this patch is one of this base, by fingerprint, names, shapes and rows. Raises: InputError."""
        patch.check_base(self.source.name, self.fingerprint)
        if patch.labels:
            raise InputError(
                f"patch '{format_text(patch.path, None)}' is a classifier's, which can be neither exported as a model "
                "nor compared or merged over its base yet: use it in its run folder, or leave --model out"
            )
        for name in patch.names:
            if name not in self.shapes:
                raise InputError(
                    f"patch '{patch.path}' has '{format_text(name)}', which '{self.source.name}' does not: give the "
                    "right base"
                )
            given, held, rows = patch.shapes[name], self.shapes[name], patch.rows(name)
            if rows is not None:
                fault = index_fault(rows, held[0])
                if fault or name not in self.linears:
                    fault = fault or "only the rows of a linear can be trained apart"
                    raise patch.unfit(f"has rows of '{name}' that '{self.source.name}' cannot have ({fault})")
                held = (len(rows), *held[1:])
            if given != held:
                raise patch.unfit(f"has '{name}' as {given}, '{self.source.name}' as {held}")


def open_pretrained(model: str) -> Pretrained:
    """The pretrained model in this folder or of this hub id. Raises: InputError as `open_source` and `read_config`."""
    source, config = open_source(model), read_config(model)
    module, head, tied = outline(config, source)
    by_identity: dict[int, list[str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        by_identity.setdefault(id(parameter), []).append(name)
        shapes[name] = matrix_shape(module.get_submodule(name.rpartition(".")[0]), parameter)
    parts = list(module.named_modules(remove_duplicate=False))
    transposed = frozenset(f"{name}.weight" for name, part in parts if is_transposed(part))
    linears = frozenset(f"{name}.weight" for name, part in parts if is_linear(part))
    return Pretrained(
        source=source,
        config=config,
        fingerprint=fingerprint(source, cache_dir() / "fingerprints.json"),
        head=head,
        embedding=next(f"{name}.weight" for name, part in parts if part is module.get_input_embeddings()),
        tied=tied,
        files=names_in_files(module, source),
        aliases={name: tuple(names) for names in by_identity.values() for name in names},
        shapes=shapes,
        transposed=transposed,
        linears=linears,
    )


def name_of_new_head(base: Pretrained) -> str:
    """What files call a head that this base does not have apart, in the spelling that transformers saves."""
    from transformers.core_model_loading import revert_weight_conversion

    (name,) = revert_weight_conversion(skeleton(base.config), {base.head: torch.empty(1, 1, device="meta")})
    return str(name)


def can_untie(config: Any, tree: Mapping[str, Any]) -> bool:
    """Whether `tie_word_embeddings: false` in this config.json (`tree`) parts the head from the embedding and no more.

    Not so where the config ignores it (T5), or where it would part an encoder's and a decoder's embedding too (BART):
    there transformers sees from the files that the head is another one.
    """
    from transformers import AutoConfig

    from edgegt.architecture import is_head_tied, untie_head

    changed = {key: value for key, value in tree.items() if key != "model_type"} | {"tie_word_embeddings": False}
    parted, kept = skeleton(AutoConfig.for_model(tree["model_type"], **changed)), skeleton(config)
    if is_head_tied(parted):
        return False
    untie_head(kept)
    return [name for name, _ in parted.named_parameters()] == [name for name, _ in kept.named_parameters()]

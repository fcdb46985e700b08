"""Scores of answers against their references, from 0 to 100 as papers print them. Needs no torch.

ROUGE and BLEU are the field's own packages (`pip install edgegt[metrics]`), imported when they are asked for. Every
answer is compared with all of its references, and the best counts; BLEU takes several references by its definition.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from edgegt.errors import InputError, nearest
from edgegt.units import format_text

Answers = Sequence[str]
References = Sequence[Sequence[str]]
Scores = dict[str, Any]
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")
# Han and kana are written without spaces: each of them counts as a word, as in MLQA's evaluation.
_KANA = re.compile("[\u3040-\u30ff]")
_ALONE = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Metric(NamedTuple):
    """scores: of answers and references, None where no answers are needed; module, package: what it is computed by."""

    scores: Callable[[Answers, References], Scores] | None
    module: str | None = None
    package: str | None = None


def normalised(text: str) -> str:
    """Lower case without ASCII punctuation, English articles and extra spaces: SQuAD's normalisation.

    Text of which nothing would be left ("The", "?!") stays in lower case. Source: arXiv 1606.05250, evaluate-v1.1.py.
    """
    lower = text.lower()
    left = " ".join(_ARTICLES.sub(" ", lower.translate(_WITHOUT_PUNCTUATION)).split())
    return left or " ".join(lower.split())


def token_f1(answer: str, reference: str) -> float:
    """SQuAD's F1 of the words that both have, from 0 to 1. Source: arXiv 1606.05250, evaluate-v1.1.py."""
    mine, theirs = _words(normalised(answer)), _words(normalised(reference))
    shared = sum((Counter(mine) & Counter(theirs)).values())
    if not mine or not theirs:
        return float(mine == theirs)
    return 2 * shared / (len(mine) + len(theirs))


def _words(text: str) -> list[str]:
    return _ALONE.sub(r" \1 ", text).split()


def _exact_match(answers: Answers, references: References) -> Scores:
    """Equal to a reference, surrounding white space aside, as in a run's eval.json."""
    same = [answer.strip() in {one.strip() for one in right} for answer, right in zip(answers, references, strict=True)]
    return {"exact_match": _mean(same)}


def _accuracy(answers: Answers, references: References) -> Scores:
    """Equal to a reference after SQuAD's normalisation, which there is called exact match."""
    same = [
        normalised(answer) in {normalised(one) for one in right}
        for answer, right in zip(answers, references, strict=True)
    ]
    return {"accuracy": _mean(same)}


def _f1(answers: Answers, references: References) -> Scores:
    pairs = zip(answers, references, strict=True)
    return {"f1": _mean([max(token_f1(answer, one) for one in right) for answer, right in pairs])}


class _RougeWords:
    """rouge-score's words, and the same for other scripts: its own tokenizer drops every letter that is not a to z."""

    def tokenize(self, text: str) -> list[str]:
        """Runs of letters, their marks and digits, in lower case; equal to rouge-score's own on ASCII."""
        kept = (one if unicodedata.category(one)[0] in "LMN" else " " for one in text.lower())
        return _words("".join(kept))


def _rouge(answers: Answers, references: References) -> Scores:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L without stemming; for each the reference that is best for it."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE_TYPES), tokenizer=_RougeWords())
    found = [scorer.score_multi(right, answer) for answer, right in zip(answers, references, strict=True)]
    return {name: _mean([one[name].fmeasure for one in found]) for name in ROUGE_TYPES}


def _bleu(answers: Answers, references: References) -> Scores:
    """Corpus BLEU as sacrebleu computes it, with its signature; words as mteval-v13a cuts them."""
    from sacrebleu.metrics.bleu import BLEU

    written = "".join(one for right in references for one in right)
    by = "char" if _KANA.search(written) else "zh" if _ALONE.search(written) else "13a"
    metric = BLEU(tokenize=by, force=True)
    most = max(len(right) for right in references)
    streams = [[right[place] if place < len(right) else None for right in references] for place in range(most)]
    return {"bleu": float(metric.corpus_score(answers, streams).score), "bleu_signature": str(metric.get_signature())}


def _mean(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values)


METRICS = {
    "exact_match": Metric(_exact_match),
    "accuracy": Metric(_accuracy),
    "f1": Metric(_f1),
    "rouge": Metric(_rouge, "rouge_score.rouge_scorer", "rouge-score"),
    "bleu": Metric(_bleu, "sacrebleu.metrics.bleu", "sacrebleu"),
    "perplexity": Metric(None),
}


def parse_metrics(text: str) -> tuple[str, ...]:
    """The metrics that 'rouge,bleu' names, each once and in this order.

    Raises: InputError for a name that is none, and for a metric whose package is missing.
    """
    names = tuple(dict.fromkeys(one.strip().lower().replace("-", "_") for one in text.split(",") if one.strip()))
    if not names:
        raise InputError(f"--metrics names none: give some of {', '.join(METRICS)}, divided by commas")
    for name in names:
        if name not in METRICS:
            shown = format_text(name)
            raise InputError(f"metric '{shown}' is unknown{nearest(name, METRICS)}: give some of {', '.join(METRICS)}")
    for name in names:
        module = METRICS[name].module
        try:
            if module is not None:
                import_module(module)
        except ImportError as error:
            package = METRICS[name].package
            raise InputError(f"metric '{name}' needs {package}: pip install edgegt[metrics]") from error
    return names


def asks(names: Sequence[str]) -> bool:
    """Whether any of these needs answers of the model."""
    return any(METRICS[name].scores is not None for name in names)


def score(names: Sequence[str], answers: Answers, references: References) -> Scores:
    """What each metric says of the answers, each with a list of references (at least one); perplexity is left out."""
    found: Scores = {}
    for name in names:
        scores = METRICS[name].scores
        if scores is not None:
            found |= scores(answers, references)
    return found

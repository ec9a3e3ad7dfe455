"""The metrics of the COCO caption scripts that E2E uses: ROUGE-L, CIDEr and METEOR, by pycocoevalcap.

Source: Chen et al. 2015, arXiv:1504.00325; https://github.com/salaniz/pycocoevalcap.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from foreword.errors import DataError, MissingPackage
from foreword.metrics.metric import Mean, Metric, Numbers, Targets
from foreword.metrics.ngram import SCRIPT_REFERENCES
from foreword.metrics.tokens import one_line, ptb_tokens, split_at_punctuation
from foreword.optional import optional

__all__ = ["Cider", "CocoRougeL", "Meteor"]


class CocoRougeL(Mean):
    """ROUGE-L as COCO and the E2E script count it: best precision and best recall of all references, recall weighted.

    F with beta 1.2 of Penn Treebank tokens without punctuation, not stemmed. `rouge_l`, which the papers on
    summaries have, is another number.

    >>> CocoRougeL()(["a pub by the river"], [["A pub.", "By the river!"]])  # precision 3/5, recall 1
    78.54...
    """

    name = "rouge_l_coco"
    description = "ROUGE-L of COCO and E2E: F1.2 of PTB tokens, best precision and recall of all references, averaged"

    def row_statistics(self, hypotheses: Sequence[str], targets: Targets) -> list[list[float]]:
        scorer = optional("pycocoevalcap.rouge.rouge", "eval").Rouge()
        return [
            [float(scorer.calc_score([ptb_tokens(hypothesis)], [ptb_tokens(text) for text in references])), 1.0]
            for hypothesis, references in zip(hypotheses, targets, strict=True)
        ]


class Cider(Metric):
    """CIDEr (Vedantam et al. 2015, arXiv:1411.5726) in COCO's units, 0 to 10; E2E systems reach 2.3.

    The similarity of n-grams, weighted by how rare they are among the references of all rows, also where rows are
    resampled for an interval. A single row has no rare n-grams and scores 0.
    """

    name = "cider"
    description = "CIDEr of COCO and E2E, 0 to 10: n-grams of PTB tokens weighted by rareness, averaged"
    maximum = 10.0
    digits = 2

    def row_statistics(self, hypotheses: Sequence[str], targets: Targets) -> list[list[float]]:
        scorer = optional("pycocoevalcap.cider.cider", "eval").Cider()
        found = {row: [ptb_tokens(hypothesis)] for row, hypothesis in enumerate(hypotheses)}
        right = {row: [ptb_tokens(text) for text in references] for row, references in enumerate(targets)}
        _, scores = scorer.compute_score(right, found)
        return [[float(score), 1.0] for score in scores]

    def score(self, sums: Numbers) -> float:
        total, rows = sums.tolist()
        return float(total / rows)


class Meteor(Metric):
    """METEOR 1.5 (Denkowski and Lavie 2014, W14-3348), English, by its own program: it needs Java.

    `tokens` is `ptb`, what COCO and the E2E script hand to it, by Stanford's tokenizer; or `split`, the lower-cased
    text split at punctuation with the first three references of each row, which the scripts of WebNLG and DART do.
    The corpus score comes from the summed matches of all rows. Raises `MissingPackage` without pycocoevalcap or Java.
    """

    def __init__(self, name: str = "meteor", tokens: str = "ptb") -> None:
        self.name, self._tokens = name, tokens
        how = "PTB tokens, as COCO and E2E" if tokens == "ptb" else "split at punctuation, as WebNLG and DART"
        self.description = f"METEOR 1.5 of the corpus, {how}, best reference of each row; needs Java"

    def ready(self) -> None:
        """Look for the program and Java, without the seconds that a start takes."""
        _jar("pycocoevalcap.meteor", "meteor-1.5.jar")
        _java_program()

    def row_statistics(self, hypotheses: Sequence[str], targets: Targets) -> list[list[float]]:
        """The 23 numbers of the program: lengths, function words, matches of four kinds, chunks, matched words."""
        counts = [len(references) for references in targets]
        if self._tokens == "split":
            counts = [min(count, SCRIPT_REFERENCES) for count in counts]
        texts = [*hypotheses, *(text for row, count in zip(targets, counts, strict=True) for text in row[:count])]
        prepared = _stanford_tokens(texts) if self._tokens == "ptb" else [split_at_punctuation(text) for text in texts]
        prepared = [one_line(text.replace("|||", " ")) for text in prepared]
        lines, start = [], len(hypotheses)
        for hypothesis, count in zip(prepared, counts, strict=False):
            lines.append(" ||| ".join(["SCORE", *prepared[start : start + count], hypothesis]))
            start += count
        jar = _jar("pycocoevalcap.meteor", "meteor-1.5.jar")
        answers = _java(["-Xmx2G", "-jar", jar, "-", "-", "-stdio", "-l", "en", "-norm"], lines)
        return [_without_perfect_chunk([float(number) for number in answer.split()]) for answer in answers]

    def score(self, sums: Numbers) -> float:
        """The program's own formula, with its parameters for English."""
        alpha, beta, gamma, delta = 0.85, 0.2, 0.6, 0.75
        values = sums.tolist()
        matched = [0.0, 0.0]  # weighted matches of the hypothesis, and of the reference
        for kind, weight in enumerate((1.0, 0.6, 0.8, 0.6)):  # exact, stem, synonym, paraphrase
            for side in (0, 1):
                content, function = values[4 + 4 * kind + side], values[6 + 4 * kind + side]
                matched[side] += weight * (delta * content + (1 - delta) * function)
        lengths = [delta * (values[side] - values[2 + side]) + (1 - delta) * values[2 + side] for side in (0, 1)]
        if not all(matched) or not all(lengths):
            return 0.0
        precision, recall = (matches / length for matches, length in zip(matched, lengths, strict=True))
        mean = 1.0 / ((1 - alpha) / precision + alpha / recall)
        chunks, *words = values[20:23]
        return float(100.0 * max(0.0, mean * (1 - gamma * (2 * chunks / sum(words)) ** beta)))


def _without_perfect_chunk(numbers: list[float]) -> list[float]:
    """The numbers of a row as they add up to a corpus: of a perfect match the only chunk is no fragment."""
    if len(numbers) != 23:
        raise DataError(f"{len(numbers)} numbers for a row from METEOR", "23", "install pycocoevalcap again")
    matches = [sum(numbers[4 + side : 20 : 2]) for side in (0, 1)]
    if matches == numbers[:2] and numbers[20] == 1:
        numbers[20] = 0.0
    return numbers


def _stanford_tokens(texts: Sequence[str]) -> list[str]:
    """COCO's tokens: Stanford's PTBTokenizer, lower-cased, without punctuation."""
    package = optional("pycocoevalcap.tokenizer.ptbtokenizer", "eval")
    jar = _jar("pycocoevalcap.tokenizer", package.STANFORD_CORENLP_3_4_1_JAR)
    command = ["-cp", jar, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    lines = _java(command, [one_line(text) for text in texts])
    punctuation = set(package.PUNCTUATIONS)
    return [" ".join(token for token in line.split() if token not in punctuation) for line in lines]


def _jar(package: str, name: str) -> str:
    return str(Path(optional(package, "eval").__path__[0]) / name)


def _java_program() -> str:
    java = shutil.which("java")
    if java is None:
        raise MissingPackage("the program 'java' is not installed", "Java 8 or later", "install a Java runtime (JRE)")
    return java


def _java(arguments: Sequence[str], lines: Sequence[str]) -> list[str]:
    """What a Java program answers to the lines, a line for each."""
    text = "".join(line + "\n" for line in lines)
    command = [_java_program(), "-Dfile.encoding=UTF-8", *arguments]
    done = subprocess.run(command, input=text.encode("utf-8", "replace"), capture_output=True, check=False)
    answers = done.stdout.decode("utf-8", "replace").split("\n")[: len(lines)]
    if done.returncode or len(answers) != len(lines):
        reason = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["no message"]
        raise DataError(
            f"Java stopped with status {done.returncode} after {len(answers)} of {len(lines)} lines ({reason[0]})",
            "an answer for every line", "check the Java installation and that 2 GB of memory are free",
        )  # fmt: skip
    return answers

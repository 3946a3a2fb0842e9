"""The rewriter's training, on paraphrases of the clip world's captions that are made as they are needed.

`python -m models.mini.train_rewriter` measures the checkpoint's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from models.mini.captions import canonical, read
from models.mini.paraphrases import CHOICES, NAMES, OTHER_NAMES, Paraphrase, complete, paraphrase, part
from models.mini.rewriter import Rewriter
from models.mini.training import Run, train
from models.mini.words import encode
from models.mini.world import draw

BATCH = 64
# A prompt that is a canonical caption already must stay as it is.
CANONICAL_SHARE = 0.06


def train_rewriter(run: Run) -> None:
    rng = np.random.default_rng([run.rank, int(run.state_path.exists()), 7])
    rewriter = Rewriter.untrained()
    index = {word: id for id, word in enumerate(rewriter.config["words"])}

    def step(_: int, __: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        said = [_example(rng) for _ in range(BATCH)]
        choices = [int(rng.integers(CHOICES)) for _ in said]
        targets = [encode(canonical(complete(p, c)), index) for p, c in zip(said, choices, strict=True)]
        loss = rewriter.loss([p.text for p in said], targets, choices)
        return loss, {"loss": loss.detach()}

    def report(step: int) -> dict[str, float]:
        return measure(rewriter, 200) if run.judges(step) else {}

    train(run, {"rewriter": rewriter}, step, report)


def _example(rng: np.random.Generator) -> Paraphrase:
    attributes = draw(rng)
    if rng.random() >= CANONICAL_SHARE:
        return paraphrase(attributes, rng)
    named = {*NAMES, *(f"other {name}" for name in OTHER_NAMES)}
    return Paraphrase(canonical(attributes), attributes, frozenset(named))


@torch.no_grad()
def measure(
    rewriter: Rewriter, count: int, *, seed: int = 11, held_out: bool = True, full: bool = False
) -> dict[str, float]:
    """On combinations that training never saw: the share of paraphrases whose named attributes all come out right,
    each attribute's share over the paraphrases that name it, and the share that is exactly the caption wished for.
    """
    rng = np.random.default_rng(seed)
    said = [paraphrase(draw(rng, held_out=True), rng, held_out=held_out, full=full) for _ in range(count)]
    choices = [int(rng.integers(CHOICES)) for _ in said]
    texts = [
        t
        for i in range(0, count, 100)
        for t in rewriter.rewrite([p.text for p in said[i : i + 100]], choices[i : i + 100])
    ]
    right: dict[str, list[bool]] = {"all": [], "exact": []}
    for p, choice, text in zip(said, choices, texts, strict=True):
        got = read(text)
        verdicts = {name: got is not None and part(got, name) == part(p.attributes, name) for name in p.named}
        for name, verdict in verdicts.items():
            right.setdefault(name, []).append(verdict)
        right["all"].append(all(verdicts.values()))
        right["exact"].append(text == canonical(complete(p, choice)))
    return {name: float(np.mean(values)) for name, values in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a rewriter on held-out paraphrases.")
    parser.add_argument("--rewriter", type=Path, default=Path(__file__).parent / "checkpoint" / "rewriter")
    parser.add_argument("--count", type=int, default=1000)
    options = parser.parse_args()
    rewriter = Rewriter.load(options.rewriter)
    rows = {
        "held-out wordings": measure(rewriter, options.count),
        "the same, everything named": measure(rewriter, options.count, full=True),
        "wordings of training": measure(rewriter, options.count, held_out=False),
    }
    for title, shares in rows.items():
        print(title, *(f"{name} {100 * share:.1f} %" for name, share in shares.items()), sep="\n  ")


if __name__ == "__main__":
    main()

"""Captions of the clip world in many wordings, and the tokenizer that is trained on them."""

from __future__ import annotations

from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from models.mini.world import Attributes, all_attributes

NOUNS = {
    "ball": ("ball", "ball", "sphere"),
    "cube": ("cube", "cube", "box", "block"),
    "cylinder": ("cylinder", "cylinder", "drum"),
    "cone": ("cone", "cone", "pyramid"),
}
SIZES = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big", "huge")}
COLORS = {"purple": ("purple", "purple", "violet"), "cyan": ("cyan", "cyan", "turquoise")}
MOTIONS = {
    "left": ("moving left", "moving to the left", "moves left", "going left", "sliding to the left"),
    "right": ("moving right", "moving to the right", "moves right", "going right", "sliding to the right"),
    "closer": ("coming closer", "comes closer", "approaching", "moving towards the camera", "coming nearer"),
    "away": ("going away", "goes away", "receding", "moving away from the camera", "moving into the distance"),
    "bouncing": ("bouncing", "bounces", "bouncing up and down", "jumping up and down"),
    "spinning": ("spinning", "spins", "rotating", "turning around", "spinning in place"),
    "still": ("standing still", "stands still", "at rest", "not moving", "resting"),
}
FLOORS = {
    "grey": ("on a grey floor", "on a gray floor", "on grey ground"),
    "green": ("on a green floor", "on grass", "on green ground"),
    "sand": ("on a sand floor", "on sand", "on a sandy floor"),
    "navy": ("on a navy floor", "on a dark blue floor", "on navy ground"),
}
LIGHTS = {
    "noon": ("at noon", "at midday", "in daylight", "under the noon sun"),
    "sunset": ("at sunset", "at dusk", "in the evening light", "under a setting sun"),
    "night": ("at night", "by night", "in the dark", "in moonlight"),
}
SPOKEN_EVERYWHERE = ("a video of", "a clip of", "there is", "we see")


def canonical(attributes: Attributes) -> str:
    """The plain caption that names every attribute."""
    a = attributes
    return f"a {a.size} {a.color} {a.shape} {MOTIONS[a.motion][0]} {FLOORS[a.floor][0]} {LIGHTS[a.light][0]}"


def caption(attributes: Attributes, rng: np.random.Generator) -> str:
    """One random wording; now and then size, floor or light stays unsaid. Colour, shape and motion are always said."""
    a = attributes
    if rng.random() < 0.3:
        return canonical(a)

    def pick(words: tuple[str, ...]) -> str:
        return words[rng.integers(len(words))]

    size = "" if rng.random() < 0.12 else pick(SIZES[a.size]) + " "
    thing = f"{size}{pick(COLORS.get(a.color, (a.color,)))} {pick(NOUNS[a.shape])}"
    article = "an" if thing[0] in "aeiou" else "a"
    places = [pick(FLOORS[a.floor])] if rng.random() > 0.08 else []
    times = [pick(LIGHTS[a.light])] if rng.random() > 0.08 else []
    motion = pick(MOTIONS[a.motion])
    where = [*places, *times]
    if len(where) == 2 and rng.random() < 0.3:
        where.reverse()
    if where and rng.random() < 0.15:
        text = f"{where[-1]}, {article} {thing} {' '.join([motion, *where[:-1]])}"
    else:
        text = " ".join([article, thing, motion, *where])
        if rng.random() < 0.1:
            text = f"{pick(SPOKEN_EVERYWHERE)} {text}"
    return text


def build_tokenizer() -> Tokenizer:
    """A byte-level BPE trained on the captions: their words are one token each, and any other text still encodes."""
    rng = np.random.default_rng(0)
    world = all_attributes()
    corpus = [caption(world[rng.integers(len(world))], rng) for _ in range(8000)]
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


def wrap_tokenizer(tokenizer: Tokenizer, length: int) -> Any:
    """The same tokenizer as transformers (and so `WanPipeline`) wants it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=length
    )

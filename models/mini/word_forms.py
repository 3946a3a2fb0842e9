"""Forms and combinations of the words in `loose_words`, as patterns: what the rewriter learns to generalise from.

In a pattern `[a|b|]` stands for one of its alternatives, the empty one too. A phrase that is held out is never made.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from models.mini import captions, loose_words

Patterns = Mapping[str, tuple[str, ...]]

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_TABLES = ("NOUNS", "SIZES", "COLORS", "MOTIONS", "FLOORS", "LIGHTS", "CAMERAS", "RELATIONS")
_HELD_OUT = frozenset(
    [phrase for table in _TABLES for _, kept in getattr(loose_words, table).values() for phrase in kept]
    + [phrase for parts in (loose_words.BEATS, loose_words.OPENINGS) for phrase in parts[1]]
)


def fill(pattern: str, rng: np.random.Generator) -> str:
    """One phrase of a pattern, at random; never one that is held out."""
    while True:
        text = _CHOICE.sub(lambda found: _one(found[1].split("|"), rng), pattern)
        text = " ".join(text.split())
        if text not in _HELD_OUT or "[" not in pattern:
            return text


def _one(words: list[str], rng: np.random.Generator) -> str:
    return words[int(rng.integers(len(words)))]


def _join(words: tuple[str, ...]) -> str:
    return "[" + "|".join(dict.fromkeys(words)) + "]"


def _colors() -> Patterns:
    """Each colour's words with "coloured", "-ish", and two of them together."""
    table = {}
    for color, (known, _) in loose_words.COLORS.items():
        words = _join((*known, *captions.COLORS.get(color, (color,))))
        table[color] = (
            f"{words}[ | |-][coloured|colored|tinted]",
            f"{words}[ |-]{color}",
            f"[{color}|{known[0]}|{known[-1]}]ish",
            f"[bright|dark|light|deep|pale|vivid|shiny|pure|soft|glossy] {words}",
        )
    return table


_GO = (
    "[drifts|drifting|rolls|rolling|heads|heading|slides|sliding|glides|gliding|goes|going|go|moves|moving|move|"
    "travels|traveling|travelling|wanders|wandering|flies|runs|running|floats|walks|shifts|shifting|passes|creeps]"
)


def _sideways(side: str) -> tuple[str, ...]:
    return (
        f"{_GO} [off|slowly|quickly|over|] [{side}|{side}ward|{side}wards|to the {side}|towards the {side}]",
        f"{_GO} [to|toward|towards|for|over to] the {side}[ side| edge| hand side|]",
        f"[in motion|on its way|moving|a move|motion] [to the {side}|{side}wards|towards the {side}]",
        f"{side}[ward|wards] [movement|motion|drift|slide|roll]",
    )


_US = "[us|me|the camera|the viewer|the lens|the screen]"
MOTIONS: Patterns = {
    "left": _sideways("left"),
    "right": _sideways("right"),
    "closer": (
        "[comes|coming|come|gets|getting|draws|drawing|moves|moving|rolls|rolling|creeps] [slowly|] [closer|nearer]"
        f"[ to {_US[1:-1].replace('|', '| to ')}|]",
        f"{_GO} [straight|right|] [toward|towards|at|up to] {_US}",
        f"[comes|coming|come|heads|heading|making|makes] [straight|right|] [for|at|toward|towards|up to] {_US}",
        f"[nears|nearing|approaches|approaching|approach] [{_US[1:-1]}|]",
        f"[advances|advancing] [{_US[1:-1].replace('|', '|on ')}|]",
        "[gets|getting|growing|grows] [bigger and closer|nearer and nearer|closer and closer]",
    ),
    "away": (
        f"{_GO} [away|off|further away|farther away|further off] [from us|from the camera|from me|into the distance|]",
        "[backs|backing|pulls|pulling|turns and goes] [away|off] [from us|from the camera|slowly|]",
        "[retreats|retreating|withdraws|withdrawing|recedes|receding|departs|departing|leaves|leaving|vanishes]"
        " [into the distance|slowly|from us|]",
        "[disappears|disappearing|vanishing|rolls|rolling|runs off|fades] [off|] [in|into] the [distance|background]",
        "[leaves|leaving|retreats|escapes] [us|the camera|the viewer|the scene]",
    ),
    "bouncing": (
        "[hops|hopping|hop|jumps|jumping|jump|leaps|leaping|leap|springs|bounces|bouncing|bounce|bobs|bobbing]"
        " [|up and down|around|about|on the spot|like mad|like crazy|again and again|happily|for joy|like a ball]",
        "[springing|springs|spring|going|goes|moves|moving|bobs] up and down [|like mad|all the time|happily]",
        "[with|in] [hops|jumps|leaps|bounces|little jumps]",
    ),
    "spinning": (
        "[spins|spinning|spin|rotates|rotating|rotate|twirls|twirling|whirls|whirling|revolves|revolving|turns|turning]"
        " [around|round|round and round|on the spot|in place|around its axis|like a top|in circles|about itself]",
        "[spins|spinning|rotates|rotating|twirls|twirling|whirls|whirling|revolves|revolving] [fast|slowly|]",
        "[rotates|twirls|whirls|revolves|turns] and [spins|rotates|twirls|turns]",
    ),
    "still": (
        "[sits|sitting|stands|standing|stays|staying|lies|lying|rests|resting|is|remains|remaining] [there|just|quite|]"
        " [still|motionless|idle|frozen|stationary|unmoving|in place|where it is|at rest]",
        "[sits|stands|lies|rests|waits|just sits|just stands|sitting|standing] [there|around|in its place]",
        "[not|never|isn't|is not|hardly] [moving|in motion] [|at all|one bit]",
        "[doesn't|does not|won't|not going to] [move|budge|go anywhere|do anything]",
        "[with no|without|without any|no] [motion|movement|moving]",
    ),
}

SIZES: Patterns = {
    "small": (
        "[very|really|quite|super|rather|so|extremely] [small|little|tiny|mini|miniature|wee|petite|compact]",
        "[small|mini|miniature|pocket|compact][-| ][size|sized]",
        "[small little|tiny little|little tiny|teeny weeny|tiny wee|itty bitty|small-ish|littlest|smallest]",
    ),
    "large": (
        "[very|really|quite|super|rather|so|extremely|hugely|enormously] [large|big|huge|giant|massive|enormous]",
        "[large|giant|massive|king|big|huge][-| ]sized",
        "[big huge|great huge|huge great|big fat|big old|really really big|enormously big|gigantically large|biggest]",
    ),
}
_THING = "[thing|object|shape|body|toy|form]"
NOUNS: Patterns = {
    "ball": (
        f"[round|spherical|ball-shaped|ball-like] {_THING}",
        "[round|rubber|bouncy|smooth|spherical|glass|toy] [ball|sphere|orb|globe|marble]",
        "[ball|sphere|globe|marble|beach ball][s|]",
    ),
    "cube": (
        f"[square|cubic|boxy|cube-shaped|box-like|cubical] {_THING}",
        "[square|cubic|boxy|wooden|solid|toy|cubical] [box|block|crate|brick|die|dice]",
        "[box|crate|dice|square]es",
        "[block|brick|crate|toy cube|box cube|block cube][s|]",
    ),
    "cylinder": (
        f"[cylindrical|tubular|cylinder-shaped|barrel-shaped|can-like] {_THING}",
        "[cylindrical|round|metal|upright|tubular|toy] [drum|barrel|tube|pillar|column|cylinder]",
        "[can|tin can|cylinder|pillar|column|tube][s|]",
    ),
    "cone": (
        f"[conical|cone-shaped|pointed|pointy|pyramid-like|cone-like] {_THING}",
        "[conical|pointy|pointed|toy|sharp] [cone|hat|pyramid|party hat|tipi]",
        "[traffic cone|pyramid hat|spike|party hat|tipi|cone hat|pointy hat][s|]",
    ),
}


def _ground(what: str, nouns: str, more: str) -> tuple[str, ...]:
    return (
        f"[on|over|across|along|upon|above|on top of] [a|the|some|] {what} {nouns}",
        f"{what} {nouns}",
        f"[on|over|across|along|upon] [a|the|some|] {more}",
        f"the [floor|ground] is [{what[1:-1]}|{more[1:-1]}]",
    )


FLOORS: Patterns = {
    "grey": _ground(
        "[grey|gray|greyish|grayish|stone|concrete|asphalt|cement]",
        "[floor|ground|tiles|surface|pavement]",
        "[concrete|asphalt|cement|stone|pavement]",
    ),
    "green": _ground(
        "[green|grassy|greenish|grass|lush green]",
        "[floor|ground|tiles|surface|field|meadow|turf]",
        "[grass|lawn|turf|meadow|grassland]",
    ),
    "sand": _ground(
        "[sandy|sand|sand-coloured|desert|beach]",
        "[floor|ground|tiles|surface|dunes]",
        "[sand|beach|beach sand|dunes|desert|sandy beach by the sea]",
    ),
    "navy": _ground(
        "[navy|navy blue|navy-blue|dark blue|dark-blue|deep blue|deep-blue|midnight blue|midnight-blue]",
        "[floor|ground|tiles|surface|carpet]",
        "[navy|navy blue|dark blue|deep blue|midnight blue]",
    ),
}
LIGHTS: Patterns = {
    "noon": (
        "[at|around|by|in the] [noon|midday|high noon|lunch time|middle of the day|day]",
        "[in|under|by] [the|] [bright|full|strong|clear|] [daylight|noon sun|midday sun|sunlight|midday light]",
        "[on a|during a|on this] [bright|sunny|clear] [day|noon]",
        "[bright|sunny|clear|daytime] [day|noon|daylight|midday|scene|light]",
    ),
    "sunset": (
        "[at|around|before|near|in the|by] [sunset|dusk|sundown|twilight|evening|golden hour|nightfall]",
        "[in|under|by] [the|] [warm|golden|red|late|soft|] [evening light|sunset light|evening sun|light of dusk|dusk]",
        "[when|as|just as] the [sun|day] [sets|goes down|ends|is setting|is going down]",
        "[golden|warm|late|red] [evening|sunset|sundown|evening sun|dusk]",
    ),
    "night": (
        "[at|by|in the|around|in the dead of] [night|midnight|dark|darkness|night time|nighttime]",
        "[in|under|by] [the|] [dark|pale|starry|black|] [moonlight|night sky|moon|stars|starlight]",
        "[on a|during a|in a|one] [dark|moonlit|starry|black|quiet] night",
        "[dark|moonlit|starry|late|black] [night|scene|night sky|midnight|nighttime]",
    ),
}
_CAMERA = "[the camera|camera|cam|a camera|view|the view|the shot]"


def _pan(side: str) -> tuple[str, ...]:
    to = f"[{side}|{side}wards|to the {side}|towards the {side}|over to the {side}]"
    return (
        f"{_CAMERA} [is|] [slowly|] [pans|panning|swings|sweeps|sweeping|turns|turning|rotates|looks|looking] {to}",
        f"[slow|quick|smooth|gentle|long|camera|] pan {to}",
        f"[a|slow|smooth|] {side}[ward|] [pan|pan shot|camera pan|camera move|camera turn]",
        f"[look|looking|pan|turn|swing|sweep] the camera {to}",
        f"[panning|panned|pan] {to}",
    )


def _zoom(zooms: str, dollies: str) -> tuple[str, ...]:
    onto = "on it|on the scene|slowly|smoothly|gently" if zooms == "in" else "slowly|smoothly|gently|of the scene"
    return (
        f"{_CAMERA} [is|] [slowly|] [zooms|zooming|zoom|dollies|dollying|pulls|moves] {dollies}",
        f"[zoom|zooming|zooms|dolly|camera zoom] {zooms} [{onto}|]",
        f"[slow|smooth|quick|gentle|steady|camera|a] [zoom|zoom|dolly|dolly zoom|zooming shot] {zooms}",
        f"[slowly|gently|smoothly|steadily] [zooming|zooms|zoom|dollying] {zooms}",
    )


CAMERAS: Patterns = {
    "still": (
        f"{_CAMERA} [is|stays|stands|remains|keeps|held|] [still|fixed|static|locked|steady|motionless|unmoving]",
        "[a|] [static|fixed|steady|still|locked|locked-off|tripod|motionless] [shot|camera|view|cam|frame|tripod shot]",
        "[no|without|without any] [camera movement|camera motion|camera moves|panning or zooming]",
        f"{_CAMERA} [doesn't|does not|never|won't] [move|pan or zoom|go anywhere|budge]",
        "[shot|filmed|seen] from a [tripod|fixed camera|static camera|fixed spot]",
    ),
    "pan left": _pan("left"),
    "pan right": _pan("right"),
    "orbit": (
        f"{_CAMERA} [is|] [slowly|] [orbits|orbiting|circles|circling|goes|going|flies|moves|travels|revolves|arcs]"
        " [around|round|around it|around the scene|in a circle|in circles|around the object]",
        f"{_CAMERA} [orbits|orbiting|circles|is orbiting|is circling] [it|the object|the scene slowly|them|]",
        "[slow|smooth|360|360 degree|full|circular|an|] [orbit|orbital|arc|circling|orbiting] [shot|view|camera|move]",
        "[orbit|orbiting|circling|flying|arc] [around|round] [it|the scene|the object|them]",
    ),
    "zoom in": _zoom("in", "[in|closer|in on it|in slowly|nearer]"),
    "zoom out": _zoom("out", "[out|back|out slowly|out of it|backwards]"),
}


def _beside(side: str, opposite: str) -> tuple[str, ...]:
    return (
        f"[just|right|] [to|on|at] [the|its|] {side} [side|hand side|] of {{}}",
        f"[just|a bit|far|] {side} [of|from] {{}}",
        f"[with|and|while|having] {{}} [to|on|at|is on|stands on] [the|its] {opposite} [side|hand side|]",
        f"[and|with|while] {{}} [is|stands|] [to|on|at] the {opposite} of it",
    )


RELATIONS: Patterns = {
    "left of": _beside("left", "right"),
    "right of": _beside("right", "left"),
    "in front of": (
        "[right|directly|close|standing|] [in front of|before] {}",
        "[with|and|while|having] {} [is|stands|standing|right|just|] [behind it|in the back|in back of it]",
        "[nearer|closer] [to us|to the camera|to the viewer|] than {}",
        "[hiding|covering|blocking] {}",
    ),
    "behind": (
        "[right|directly|close|standing|] [behind|in back of|at the back of] {}",
        "[with|and|while|having] {} [is|stands|standing|right|just|] [in front of it|in the front]",
        "[farther|further|farther away|further away|further back|more distant] [from us|from the camera|] than {}",
        "[hidden by|hiding behind|covered by|peeking out behind] {}",
    ),
}
COLORS: Patterns = _colors()
BEATS = (
    "[first|at first|to begin with|initially|in the beginning|starts|] {first}[,|] [then|and then|later|and later|next|"
    "afterwards|and afterwards|after that|and after that|and in the end|followed by|before|until it] {second}",
    "{second} [after|once it was|following] {first}",
)
OPENINGS = (
    "[please|could you|can you|would you|] [make|show|generate|render|create|film|draw|give] [me|us|]"
    " [a video of|a clip of|a short clip of|a scene with|a movie of|] {}[?|!|.| please|, please|, thanks|]",
    "[i want|i'd like|i would love|let us|may i|can we] [to see|see|have|get|to have] {}[?|!|.|]",
    "[video|clip|scene|footage|movie|animation|shot] [of|with|showing|in which we see] {}[, please|.|]",
)

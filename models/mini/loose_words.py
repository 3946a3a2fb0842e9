"""Words that people use for what the clip world shows, beside the captions' own; see `paraphrases`."""

from __future__ import annotations

from collections.abc import Mapping

# A value's wordings for training, then those held out. A held-out wording is a new form or a new combination of known
# words: nothing could know a wholly new word's meaning without having read more than this.
Wordings = Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]


def _split(words: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in words.split("|"))


def _table(rows: Mapping[str, tuple[str, str]]) -> Wordings:
    return {value: (_split(known), _split(kept)) for value, (known, kept) in rows.items()}


NOUNS = _table(
    {
        "ball": (
            "orb | globe | beach ball | marble | round ball | spheres",
            "marble ball | spherical thing | orbs",
        ),
        "cube": (
            "dice | die | crate | brick | cubic box | square block",
            "cubes | cubic block | boxy cube",
        ),
        "cylinder": (
            "can | barrel | tube | pillar | column | tin can",
            "cylindrical can | drums | barrels",
        ),
        "cone": (
            "traffic cone | spike | party hat | tipi | conical hat | cones",
            "conical spike | pyramids | hat cone",
        ),
    }
)
SIZES = _table(
    {
        "small": (
            "mini | miniature | wee | petite | teeny | smallish | compact",
            "teeny tiny | little wee | minis",
        ),
        "large": (
            "giant | enormous | massive | oversized | gigantic | great big | largish",
            "giant-size | huge big | massively large",
        ),
    }
)
COLORS = _table(
    {
        "red": (
            "crimson | scarlet | ruby | cherry red",
            "reddish | crimson-red | ruby coloured",
        ),
        "green": (
            "emerald | lime green | leaf-green",
            "greenish | emerald-green | lime coloured",
        ),
        "blue": (
            "azure | cobalt | sapphire | royal blue",
            "bluish | cobalt-blue | sapphire coloured",
        ),
        "yellow": (
            "golden | lemon | canary yellow",
            "yellowish | lemon-yellow | golden coloured",
        ),
        "purple": (
            "lilac | magenta | plum | lavender",
            "purplish | plum-purple | lilac coloured",
        ),
        "orange": (
            "tangerine | amber | pumpkin",
            "orangey | amber-orange | tangerine coloured",
        ),
        "white": (
            "ivory | snow white | snowy | chalk",
            "whitish | ivory-white | chalk coloured",
        ),
        "cyan": (
            "aqua | teal | aquamarine",
            "cyan-ish | aqua-cyan | teal coloured",
        ),
    }
)
MOTIONS = _table(
    {
        "left": (
            "drifts left | rolls left | heads left | slides leftwards | going to the left side | leftward "
            "motion | traveling left | goes left | move left | glides towards the left edge | from right "
            "to left | slides left",
            "drifting leftwards | rolling off to the left | glides left | heading for the left side",
        ),
        "right": (
            "drifts right | rolls right | heads right | slides rightwards | going to the right side | "
            "rightward motion | traveling right | goes right | move right | glides towards the right edge "
            "| from left to right | slides right",
            "drifting rightwards | rolling off to the right | glides right | heading for the right side",
        ),
        "closer": (
            "comes toward us | nears | gets nearer | approaches us | heads for the camera | comes at the "
            "viewer | approaches | coming at us | rolls towards me | moves closer | advancing | come "
            "closer | drawing near",
            "getting closer to us | nearing the camera | heading towards the viewer | draws nearer",
        ),
        "away": (
            "leaves | retreats | off into the distance | moves off | backs away | departs | go away | "
            "withdraws | gets further away | moving away from us | disappears into the distance | rolls "
            "away | heads away",
            "retreating from the camera | leaving into the distance | moves further off | backing off",
        ),
        "bouncing": (
            "hops | hopping | jumps | leaping | leaps | springs up and down | bounce | bouncy | bobbing "
            "up and down | boing boing | goes up and down | jumping | jumping for joy | bounces around",
            "hop up and down | leaping up and down | bouncing like mad | springing",
        ),
        "spinning": (
            "twirls | rotates | whirls | turns on the spot | revolves | pirouettes | spin | whirling | "
            "twirling | spins around its axis | turns round and round | rotating slowly | in rotation",
            "revolving in place | rotates on the spot | twirling around | spins and spins",
        ),
        "still": (
            "sits | just sits there | motionless | stationary | frozen | idle | parked | doesn't move | "
            "sitting | stands there | stays put | does nothing | lying there | without moving | stays "
            "where it is | stand still",
            "sits still | not moving at all | standing there motionless | stays in place",
        ),
    }
)
FLOORS = _table(
    {
        "grey": (
            "on concrete | on asphalt | on a stone floor | on cement | grey floor | gray tiles | on grey "
            "tiles | concrete",
            "on grey concrete | gray stone ground | on an asphalt floor | greyish floor",
        ),
        "green": (
            "on a lawn | in a meadow | on turf | on the grass | green floor | grassland | on green tiles "
            "| on a green field",
            "on a grassy lawn | green turf | in the grass | greenish floor",
        ),
        "sand": (
            "on a beach | in the desert | on dunes | on the beach | sandy ground | beach | desert | on yellow sand",
            "on the sand of a beach | desert sand | on sandy dunes | sandy beach",
        ),
        "navy": (
            "on dark blue tiles | on a midnight blue floor | on deep blue ground | navy floor | dark-blue "
            "floor | on navy blue tiles",
            "on navy-blue ground | deep blue floor | dark blue ground | on midnight-blue tiles",
        ),
    }
)
LIGHTS = _table(
    {
        "noon": (
            "in broad daylight | midday sun | on a bright day | daytime | noon | at lunch time | by day | "
            "in full sun | midday",
            "bright daylight | under the midday sun | during the day | in bright noon sun",
        ),
        "sunset": (
            "golden hour | at sundown | in the evening | dusk | sunset | as the sun goes down | at the "
            "end of the day | twilight",
            "during sunset | evening sun | in the golden light of dusk | while the sun sets",
        ),
        "night": (
            "after dark | moonlit | under a starry sky | at midnight | nighttime | night | in the middle "
            "of the night | under the moon",
            "during the night | late at night | on a moonlit night | in darkness",
        ),
    }
)
CAMERAS = _table(
    {
        "still": (
            "locked-off shot | tripod shot | steady camera | no camera movement | fixed camera | static "
            "shot | still camera",
            "camera locked | a steady tripod shot | camera fixed | static cam",
        ),
        "pan left": (
            "camera sweeps left | pan left | camera swings left | look left | left pan | camera turning "
            "left | cam pans left",
            "camera swinging to the left | sweeping pan left | pans left | a left sweep of the camera",
        ),
        "pan right": (
            "camera sweeps right | pan right | camera swings right | look right | right pan | camera "
            "turning right | cam pans right",
            "camera swinging to the right | sweeping pan right | pans right | a right sweep of the camera",
        ),
        "orbit": (
            "arc shot | camera flies around it | camera revolves around the scene | 360 shot | orbit | "
            "orbit shot | circling camera | camera goes round | cam orbits",
            "orbiting shot | camera flying in an arc | camera in orbit | camera circling the scene",
        ),
        "zoom in": (
            "dolly in | push in | camera zooms closer | close in slowly | zoom | zoom in on it | zoom-in "
            "| camera pushes in | cam zooms in",
            "slow zoom in | camera dollies in | zooms in | pushing in",
        ),
        "zoom out": (
            "dolly out | pull back | camera pulls out | widening shot | zoom out | zoom-out | camera "
            "zooms back | cam zooms out",
            "slow zoom out | camera dollies out | zooms out | pulling back",
        ),
    }
)
# With the second object in place of {}.
RELATIONS = _table(
    {
        "left of": (
            "left of {} | to the left of {} | on the left side of {} | with {} to its right | left from "
            "{} | and {} on the right of it",
            "at the left of {} | with {} on its right side",
        ),
        "right of": (
            "right of {} | to the right of {} | on the right side of {} | with {} to its left | right "
            "from {} | and {} on the left of it",
            "at the right of {} | with {} on its left side",
        ),
        "in front of": (
            "in front of {} | nearer than {} | before {} | with {} behind it | closer to us than {} | "
            "hiding {} behind it",
            "just in front of {} | with {} at the back of it",
        ),
        "behind": (
            "behind {} | at the back of {} | in back of {} | with {} in front of it | farther than {} | "
            "further away than {}",
            "just behind {} | with {} before it",
        ),
    }
)
SOMETHING = ("something", "thing", "object", "toy", "item")
# How a two-beat motion is said: for training, and held out.
BEATS = (
    _split(
        "{first} then {second} | {first}, then {second} | first {first}, later {second} | {first} and "
        "then {second} | {first} -> {second} | {first}, afterwards {second} | {first} before {second} | "
        "{first}, and after that {second} | {second} after {first} | {first} & next {second} | starts "
        "{first}, ends {second}"
    ),
    _split("at first {first} and later {second} | {first} and afterwards {second} | first {first} then {second}"),
)
# What a whole prompt is put into.
OPENINGS = (
    _split(
        "{} | {} | {} | {} | please make {} | can you show me {}? | i want {} | {}, please | hey, {} "
        "thanks | generate a video of {} | a video of {} | video: {} | could i see {}? | give me {} | {} "
        "pls | a clip of {} | what would {} look like? | imagine {} | i'd like to see {} | show {} | we "
        "see {} | how about {}?"
    ),
    _split("would you make me {}, please? | a short clip with {} | can i have {}? | let me see {} | {}. thank you!"),
)

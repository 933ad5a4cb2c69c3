"""The vocabulary of the miniature: words of its captions, and common English words.

Only data. The tokenizer is built from these words, and `world.py` composes captions of them.
Changing a word changes the vocabulary, and so invalidates all trained weights.
"""

# Names of each attribute value in captions, the most common first.
SHAPES: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "heart": ("heart",),
    "ring": ("ring", "hoop"),
}
COLOURS: dict[str, tuple[str, ...]] = {
    "red": ("red", "scarlet"),
    "orange": ("orange",),
    "yellow": ("yellow",),
    "green": ("green",),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "pink": ("pink",),
    "white": ("white",),
}
TEXTURES: dict[str, tuple[str, ...]] = {
    "plain": ("", "", "", "plain"),
    "striped": ("striped",),
    "dotted": ("dotted", "spotted"),
}
SIZES: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "medium": ("", "medium"),
    "large": ("large", "big", "huge"),
}
POSITIONS: dict[str, tuple[str, ...]] = {
    "left": ("on the left", "at the left side"),
    "middle": ("in the middle", "in the centre"),
    "right": ("on the right", "at the right side"),
}
PLACES: dict[str, tuple[str, ...]] = {
    "meadow": ("in a meadow", "on the grass", "in a green field"),
    "desert": ("in the desert", "on the sand"),
    "sea": ("at sea", "on the water"),
    "snow": ("in the snow", "on a snowy hill"),
    "night": ("at night", "under a dark sky"),
    "room": ("in a room", "indoors"),
}
OPENINGS: tuple[str, ...] = ("", "", "", "a picture of", "a drawing of", "there is", "an image of")

# Words that have one appearance in every pre-training caption: (shape, colour, texture). A subject
# trained with such a word inherits some of that appearance, which can be measured.
PRIOR_WORDS: dict[str, tuple[str, str, str]] = {
    "florp": ("star", "purple", "dotted"),
    "ember": ("heart", "orange", "striped"),
    "pebble": ("circle", "white", "plain"),
}

# Words that are not in captions: they give the tokenizer common English syllables, so that other
# words are not split into bytes.
GENERAL_WORDS: tuple[str, ...] = tuple(
    """
    the of and to in is it you that he was for on are with as his they be at one have this from
    or had by hot but some what there we can out other were all your when up use word how said
    an each she which do their time if will way about many then them would write like so these
    her long make thing see him two has look more day could go come did my sound no most number
    who over know water than call first people may down side been now find any new work part
    take get place made live where after back little only round man year came show every good me
    give our under name very through just form much great think say help low line before turn
    cause same mean differ move right boy old too does tell sentence set three want air well
    also play small end put home read hand port large spell add even land here must big high
    such follow act why ask men change went light kind off need house picture try us again
    animal point mother world near build self earth father head stand own page should country
    found answer school grow study still learn plant cover food sun four thought let keep eye
    never last door between city tree cross since hard start might story saw far sea draw left
    late run while press close night real life few stop open seem together next white children
    begin got walk example ease paper often always music those both mark book letter until mile
    river car feet care second group carry took rain eat room friend began idea fish mountain
    north once base hear horse cut sure watch color face wood main photo portrait style person
    woman dog cat bird toy mascot character wearing holding standing sitting beautiful bright
    simple cartoon subject object creature badge sign called named token learn happy funny
    """.split()
)


def world_words() -> list[str]:
    """Every distinct word of the captions, in a fixed order."""
    phrases = [
        *(
            n
            for table in (SHAPES, COLOURS, TEXTURES, SIZES, POSITIONS, PLACES)
            for names in table.values()
            for n in names
        ),
        *OPENINGS,
        *PRIOR_WORDS,
        "a an and next to beside with the",
    ]
    return sorted({word for phrase in phrases for word in phrase.split()})

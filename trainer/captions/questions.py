"""The questions to the vision-language model, and the meaning of its first answer."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from families.tokens import SUBJECT

SUBJECT_SET, STYLE_SET = "subject", "style"  # what the images have in common

MOST_FEATURES = 24
_MOST_WORDS = 4  # of a feature; a longer one never occurs word for word
_ARTICLES = ("a", "an", "the", "its", "his", "her", "their")
_TOO_GENERAL = frozenset(
    "a an the and or of with in on its it is are same all every each image images color colour "
    "colors colours shape size material materials parts part marks face body features none no "
    "subject background unknown consistent identical".split()
)

# Never said of an image whose style is to be learned. Without words that are often things in the
# image, such as poster or print.
STYLE_WORDS = (
    *("artwork", "artistic", "art style", "style", "stylized", "stylised", "aesthetic"),
    *("illustration", "painting", "painterly", "drawing", "sketch", "watercolor", "watercolour"),
    *("gouache", "acrylic", "oil on canvas", "pastel", "charcoal", "brushstroke", "brush stroke"),
    *("brushwork", "linework", "line art", "hatching", "halftone", "color palette", "palette"),
    *("colour palette", "monochrome", "rendering", "cgi", "pixel art", "pixelated", "digital art"),
    *("anime", "manga", "cartoon", "comic", "photorealistic", "surreal", "impressionist"),
    *("whimsical", "dreamy", "moody", "atmospheric", "nostalgic", "evocative", "vibrant"),
)


@dataclass(frozen=True)
class Identity:
    """What is the same in all images of a subject, so captions must not mention it."""

    kind: str = ""  # such as robot
    features: tuple[str, ...] = ()  # such as red, round head

    @property
    def avoid(self) -> tuple[str, ...]:
        """All words and phrases that captions must not contain."""
        kind = (self.kind,) if self.kind else ()
        return tuple(dict.fromkeys((*kind, *self.features)))


def identity_question(count: int, kind: str = "", fault: str = "") -> str:
    """Asks which features never change. kind: the user's word for the subject."""
    this = f"the same {kind}" if kind else "one and the same subject"
    images = f"These {count} images all show" if count > 1 else "This image shows"
    again = f" Your last answer was wrong: {fault}." if fault else ""
    return (
        f"{images} {this}; places, light and poses differ. First name the subject with one or two "
        "common nouns. Then list the features by which it is recognized in every image: colors, "
        "materials, shapes, parts, marks; of people and animals also face, hair, eyes, skin, fur, "
        "age and sex; clothes only if they never change. Leave out poses, places, light and other "
        "things around it. Use one or two words for each feature. Answer in English, with exactly "
        f"these two lines:\nkind: NOUN\nfeatures: FEATURE, FEATURE, FEATURE{again}"
    )


def read_identity(answer: str, kind: str = "") -> Identity | None:
    """The identity in an answer; None if it has not the two lines that were asked for."""
    lines: dict[str, str] = {}
    for line in answer.replace("*", "").splitlines():
        name, colon, value = line.strip(" \t-#>`").partition(":")
        if colon and name.strip().lower() in ("kind", "features"):
            lines.setdefault(name.strip().lower(), value)
    noun = kind or _noun(lines.get("kind", ""))
    features = read_list(lines.get("features", ""))
    return Identity(noun, features) if noun and features else None


def read_list(text: str) -> tuple[str, ...]:
    """Features or words to avoid, separated by commas; without articles and general words."""
    found: dict[str, None] = {}
    for part in re.split(r"[,;\n]| and ", text):
        words = [each.strip(".\"'()[]") for each in part.lower().split()]
        while words and words[0] in _ARTICLES:
            words.pop(0)
        if words and len(words) <= _MOST_WORDS and set(words) - _TOO_GENERAL:
            found[" ".join(words)] = None
    return tuple(found)[:MOST_FEATURES]


def _noun(text: str) -> str:
    words = re.sub(r"[^\w\s-]", " ", text.lower()).split()
    words = [each for each in words if each not in _TOO_GENERAL]
    return " ".join(words[:3]) if len(words) <= _MOST_WORDS else ""


def caption_question(purpose: str, identity: Identity, faults: Sequence[str] = ()) -> str:
    """Asks for the caption of one image. faults: of an earlier answer."""
    again = ""
    if faults:
        again = f" An earlier caption was refused: {'; '.join(faults)}. Write another one."
    if purpose == STYLE_SET:
        return (
            "Write one English caption of 15 to 40 words for this image, as if it were a plain "
            "photo. Say who or what is in it, what happens, the place, the things around and the "
            "view. Never mention how it was made or looks as a work: no medium, technique, style, "
            "palette, mood or artist. Quote text that can be read in it. Answer with the caption "
            f"alone.{again}"
        )
    kind = identity.kind or "subject"
    avoid = ""
    if identity.avoid:
        avoid = f" Never use these words: {', '.join(identity.avoid)}."
    return (
        f"The {kind} in this image is called {SUBJECT}. Write one English caption of 15 to 40 "
        f"words that begins with {SUBJECT}. Say what {SUBJECT} does or how it is placed, where it "
        "is, which other things are around, the light, and from where it is seen. The reader "
        f"knows what {SUBJECT} looks like: do not describe its looks.{avoid} Quote text that can "
        f"be read in the image. Answer with the caption alone.{again}"
    )

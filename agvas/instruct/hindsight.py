"""Words that only a describer who was shown the truth would write: what the system prompt (request.py) forbids, as patterns.

The trained model will see neither frames nor tints nor a sound specimen beside its picture, so a text that speaks of them teaches it to
invent. Where a word has no honest use (ground truth, annotation), it is refused in every inflection; where it has one (a picture frame, a
label on a bottle, a red stain, a solder mask), only the phrases in which it tells of what was drawn, shown or told. Some honest phrases
are refused all the same ("a yellow tint", "the red area of the cap"): the prompt forbids these words, and a refused answer is asked for
again, where one that passes is trained on.
"""

from __future__ import annotations

import re

__all__ = ["find_hindsight"]

_AREA = r"(?:regions?|areas?|zones?|spots?|sections?|portions?|places?|locations?|pixels?|defects?|anomal(?:y|ies))"
_DAMAGE = r"(?:scratch(?:es)?|cracks?|dents?|holes?|chips?|stains?|notch(?:es)?|flaws?|damages?|deviations?|breaks?|cuts?)"
_LINES = r"(?:outlines?|rectangles?|frames?|contours?|circles?)"
_SOUND = r"(?:normal|good|sound|intact|defect[\s-]free|fault[\s-]?less|flawless|perfect|healthy|undamaged|ideal|golden|reference)"
_SPECIMEN = r"(?:specimens?|samples?|examples?|counterparts?)"
_PICTURE = r"(?:images?|pictures?|photos?|photographs?)"
_TOLD = r"(?:information|details?|data|context|descriptions?|hints?|labels?|knowledge|facts?|categor(?:y|ies))"
_WAS = r"(?:(?:that|which)\s+)?(?:(?:is|was|are|were|has\s+been|have\s+been)\s+)?"

_PATTERNS = {
    "ground truth": r"ground[\s_-]*truths?",
    "mask": r"(?<!solder[\s-])(?:un)?mask(?:s|ed|ing|ings)?",
    "box": r"(?:bounding[\s_-]*)?box(?:es|ed|ing)?",
    "bounding box": r"bounding|bbox(?:es)?",
    "frame": rf"framed[\s-]+(?:\w+[\s-]+)?{_AREA}|frames?\s+(?:mark|highlight|indicat)(?:s|es|ing)?",
    "outline": rf"(?<!-)(?<!ly[\s-])(?:outlined|(?:en)?circled)[\s-]+(?:\w+[\s-]+)?{_AREA}"
    r"|outlines?\s+(?:mark|highlight|indicat)(?:s|es|ing)?",
    "green outline": rf"green[\s-]+(?:\w+[\s-]+)?(?:{_LINES}|lines?|borders?|squares?)",
    "red outline or shading": rf"red[\s-]+(?:\w+[\s-]+)?(?:{_LINES}|shading|highlights?)",
    "tint": r"tint(?:s|ed|ing|ings)?",
    "the tint's colour": rf"(?:the|this|that|these|those|each|every|both|all)\s+red(?:[\s-]+(?:shaded|colou?red))?[\s-]+{_AREA}",
    "the colour of a frame or tint": r"(?:marked|shown|indicated|(?:en)?circled|framed|outlined|shaded|displayed|drawn)\s+in\s+(?:\w+\s+)?"
    r"(?:red|green)(?![\s-]+(?:paint|ink|chalk|pen|dye)\b)|(?:red|green)[\s-]+(?:outlined|framed|marked|shaded)|"
    rf"red\s+colou?r\s+(?:marks|indicates|highlights)|{_AREA}\s+{_WAS}colou?red\s+(?:in\s+)?red|the\s+(?:colou?red|shaded)\s+regions?",
    "marked region": rf"(?<!-)(?<!ly[\s-])(?:marked|indicated|designated|flagged)[\s-]+{_AREA}|"
    rf"(?:the|this|that|these|those)\s+(?:marked|indicated|framed|outlined|(?:en)?circled)\s+{_DAMAGE}",
    "a region that is marked": rf"{_AREA}\s+{_WAS}(?:marked|outlined|framed|(?:en)?circled)(?!\s+(?:by\b|with\b|[\d\"'“‘]))",
    "drawn rectangle": r"(?:marked|framed|indicated|enclosed|surrounded|outlined)\s+(?:by|with)\s+(?:an?|the)\s+(?:\w+[\s-]+)?rectangle",
    "reference": r"referenc(?:e|es|ed|ing)|referential",
    "sound specimen that was shown": rf"{_SOUND}\s+(?:\w+\s+)?(?:{_SPECIMEN}|parts?|pieces?|products?|items?|ones?)\s+(?:as\s+)?{_WAS}"
    rf"(?:shown|provided|given|supplied|pictured|displayed|depicted)|(?:the|this|that|these|those)\s+{_SOUND}\s+(?:\w+\s+)?{_SPECIMEN}",
    "comparison": r"(?<!in )(?<!by )comparisons?|(?:compared|comparing|(?:in|by)\s+(?:comparison|contrast))\s+(?:with|to|against)\s+"
    rf"(?:the|this|that|these|those|its|other)\s+(?:\w+[\s-]+){{0,2}}?"
    rf"(?:{_SPECIMEN}|{_PICTURE}|(?:normal|good)\s+(?:parts?|pieces?|products?|ones?))",
    "another picture": r"(?:first|second|third|other|another|previous|provided|given|normal|comparison|both|two|three|all|several|multiple|"
    rf"these|good|sound|plain|original|accompanying)[\s-]+{_PICTURE}|specimen['’]?s?\s+{_PICTURE}|{_PICTURE}\s+of\s+(?:an?|the)\s+{_SOUND}|"
    rf"(?:first|second|third|both|each|any|none)\s+of\s+the\s+(?:\w+\s+)?{_PICTURE}",
    "a picture's number": r"(?:images?|pictures?)\s+(?:\d|one|two|three)",
    "prior knowledge": r"(?:prior|background)[\s_-]+(?:knowledge|information|data|context)",
    "what was known": r"as\s+(?:(?:it\s+)?(?:is|was)\s+|already\s+)*known|it\s+(?:is|was)\s+(?:already\s+)?known(?!\s+as)|"
    r"(?:already|previously)\s+known|known\s+(?:beforehand|in\s+advance|already|a\s+priori|to\s+be\s+(?:anomalous|defective|faulty)|defects?|anomal(?:y|ies)|type|category)",
    "what was given": rf"(?:given|provided|supplied)\s+(?:\w+\s+)?(?:{_TOLD}|{_SPECIMEN})|"
    rf"(?:{_TOLD}|{_SPECIMEN}|{_PICTURE})\s+{_WAS}(?:given|provided|supplied)(?!\s+by)|as\s+(?:given|provided|supplied|told|informed)|(?:given|provided|supplied|told|shown)\s+(?:to\s+)?(?:me|us|you)|"
    r"(?:i|we)\s+(?:was|were|am|are|have\s+been)\s+(?:given|told|shown|informed|provided)",
    "what was told": r"(?:labels?|information|hint|prompt|task)\s+(?:says?|states?|tells?|indicates?|identifies|confirms?)(?!\s*[\"'“‘\d])|"
    r"(?:class|category|defect|anomaly|image)[\s-]+labels?|labell?ed\s+(?:as\s+)?(?:an?\s+)?(?:anomal\w+|defect\w*|abnormal|faulty)|"
    rf"according\s+to\s+(?:the\s+|what\s+)?(?:(?:given|provided|known)\b|{_TOLD}(?!\s+(?:on|of)\b))",
    "overlay": r"overla(?:y|ys|id|ying|yed)",
    "annotation": r"annotat(?:e|es|ed|ing|ion|ions|or|ors)",
    "highlighted": r"highlight(?:ed|ing)",
}
"""By the name that a reason gives it. A match of one word ("box", "mask", "tinted") may be part of a category's or kind's own name."""
_COMPILED = {name: re.compile(rf"(?<![^\W_])(?:{pattern})(?![^\W_])", re.IGNORECASE) for name, pattern in _PATTERNS.items()}


def find_hindsight(text: str, *own_names: str) -> list[tuple[str, list[str]]]:
    """(name, the phrases found) of each pattern that a text holds, in a fixed order; none in an honest text.

    Args:
        own_names: of category and kind: their words, and these words' plurals, are not held against a text where they stand alone.
    """
    excused = {word + ending for name in own_names for word in re.findall(r"[^\W_]+", name.lower()) for ending in ("", "s", "es")}
    found = {name: {match.group() for match in pattern.finditer(text)} for name, pattern in _COMPILED.items()}
    phrases = {name: sorted(match for match in matches if match.lower() not in excused) for name, matches in found.items()}
    return [(name, matches) for name, matches in phrases.items() if matches]

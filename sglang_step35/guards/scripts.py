"""Unicode's scripts of characters; nothing of tokens or SGLang."""

from functools import cache

import regex

# Unicode 18's long names, without Common, Inherited and Unknown; the frequent ones first.
NAMES = tuple(
    """
    Latin Han Cyrillic Greek Arabic Hiragana Katakana Hangul Devanagari Hebrew Thai Bengali Tamil Telugu Kannada
    Malayalam Gujarati Gurmukhi Oriya Sinhala Armenian Georgian Ethiopic Khmer Lao Myanmar Tibetan Mongolian
    Bopomofo Adlam Ahom Anatolian_Hieroglyphs Avestan Balinese Bamum Bassa_Vah Batak Beria_Erfe Bhaiksuki Brahmi
    Braille Buginese Buhid Canadian_Aboriginal Carian Caucasian_Albanian Chakma Cham Cherokee Chorasmian Coptic
    Cuneiform Cypriot Cypro_Minoan Deseret Dives_Akuru Dogra Duployan Egyptian_Hieroglyphs Elbasan Elymaic Garay
    Glagolitic Gothic Grantha Gunjala_Gondi Gurung_Khema Hanifi_Rohingya Hanunoo Hatran Imperial_Aramaic
    Inscriptional_Pahlavi Inscriptional_Parthian Javanese Jurchen Kaithi Kawi Kayah_Li Kharoshthi
    Khitan_Small_Script Khojki Khudawadi Kirat_Rai Lepcha Limbu Linear_A Linear_B Lisu Lycian Lydian Mahajani
    Makasar Mandaic Manichaean Marchen Masaram_Gondi Medefaidrin Meetei_Mayek Mende_Kikakui Meroitic_Cursive
    Meroitic_Hieroglyphs Miao Modi Mro Multani Nabataean Nag_Mundari Nandinagari New_Tai_Lue Newa Nko Nushu
    Nyiakeng_Puachue_Hmong Ogham Ol_Chiki Ol_Onal Old_Hungarian Old_Italic Old_North_Arabian Old_Permic Old_Persian
    Old_Sogdian Old_South_Arabian Old_Turkic Old_Uyghur Osage Osmanya Pahawh_Hmong Palmyrene Pau_Cin_Hau Phags_Pa
    Phoenician Proto_Cuneiform Psalter_Pahlavi Rejang Runic Samaritan Saurashtra Seal Sharada Shavian Siddham
    Sidetic SignWriting Sogdian Sora_Sompeng Soyombo Sundanese Sunuwar Syloti_Nagri Syriac Tagalog Tagbanwa Tai_Le
    Tai_Tham Tai_Viet Tai_Yo Takri Tangsa Tangut Thaana Tifinagh Tirhuta Todhri Tolong_Siki Toto Tulu_Tigalari
    Ugaritic Vai Vithkuqi Wancho Warang_Citi Yezidi Yi Zanabazar_Square
    """.split()
)
ALWAYS = frozenset({"Latin", "Greek"})  # names, units and formulas in texts of any language
# Written together: who writes in one of them reads the others.
_TOGETHER = (frozenset({"Hiragana", "Katakana", "Han"}),)
_SHARED = r"\p{Script=Common}\p{Script=Inherited}"  # digits, punctuation, symbols, accents


@cache
def _others() -> regex.Pattern:
    return regex.compile(rf"[^{_SHARED}\p{{Script=Unknown}}]")


@cache
def _of(name: str) -> regex.Pattern:
    return regex.compile(rf"\p{{Script={name}}}")


def scripts_of(text: str) -> dict[str, str]:
    """The script of every character of the text that has one of its own; "Other" for one without a name here."""
    found: dict[str, str] = {}
    left = "".join(_others().findall("".join(set(text))))
    for name in NAMES:
        if not left:
            break
        found |= dict.fromkeys(_of(name).findall(left), name)
        left = _of(name).sub("", left)
    return found | dict.fromkeys(left, "Other")


def allowed_by(message: str) -> frozenset[str]:
    """The scripts an answer to this message may use."""
    used = frozenset(scripts_of(message).values())
    for group in _TOGETHER:
        if used & (group - {"Han"}):
            used |= group
    return used | ALWAYS


def has_any(scripts: frozenset[str], text: str) -> bool:
    """Whether the text has a character of these scripts or one that all scripts share."""
    allowed = _SHARED + "".join(rf"\p{{Script={name}}}" for name in sorted(scripts))
    return regex.search(f"[{allowed}]", text) is not None

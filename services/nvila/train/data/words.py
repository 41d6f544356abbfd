"""Words, names, codes and amounts for rendered text. Drawn evenly, so that no text is likelier than another."""

from __future__ import annotations

from nvila.train.data.draw import Draw


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NOUNS = _listed(
    """
    apple arch army bank barn bath bear bell bench bird boat bone book bowl brick bridge brush bus cake camel
    camp candle car card cave chair cheese church city clock cloud coast coin corn cow crab crown cup deer desk
    dish dog door dove dream drum duck eagle earth engine farm feather fence field fire fish flag flame floor
    flute fog forest fork fox frog fruit garden gate ghost giant glass glove goat gold grape grass guitar hammer
    harbor hat hawk hill honey horse hotel house ice ink iron island jacket jar jewel judge juice jungle kettle
    key king kite knife ladder lake lamp leaf lemon letter lion lock magnet map market mask meadow melon milk
    mill mirror moon mouse museum nail needle nest night north oak ocean olive onion orange orchid oven owl
    paint palace paper parrot peach pearl pen pepper piano pillow pilot planet plate pond potato queen rabbit
    radio rain ribbon rice river road robot rocket roof rope rose ruler sail salt sand scarf school seed shadow
    sheep shell ship shoe silk silver sky snow soap sock south spoon spring stamp star station stone storm
    street sugar summer sun swan table tea tent theater tiger tower town train tree tulip tunnel turtle valley
    velvet village violin voice wagon wall watch water whale wheat wheel window winter wolf wood yard zebra
    """
)

ITEMS = _listed(
    """
    apples bananas batteries beans bread butter candles carrots cereal cheese chicken coffee cookies cups eggs
    fish flour grapes honey jam juice lamp lemons milk mushrooms napkins noodles notebook nuts oil onions
    oranges paper pasta pears pencils pepper pizza plates potatoes rice salad salt soap socks soup spoons sugar
    tape tea tomatoes towel water yogurt
    """
)

PEOPLE = _listed(
    """
    Adam Alice Amir Anna Ben Bruno Carla Clara Daniel Diana Elena Emil Emma Erik Fatima Felix Grace Hana Hugo
    Ida Ivan Jack Jana Karim Laura Leo Lena Lucas Maria Max Maya Mina Nina Noah Nora Omar Oscar Paul Petra Rosa
    Ruth Sam Sara Sofia Tara Theo Tom Vera Viktor Yusuf
    """
)

CITIES = _listed(
    """
    Athens Berlin Bern Boston Cairo Chicago Dallas Delhi Denver Dublin Geneva Hanoi Helsinki Kyoto Lagos Lima
    Lisbon London Lyon Madrid Miami Milan Nairobi Oslo Paris Porto Prague Quito Rome Seoul Sydney Tokyo Turin
    Venice Vienna Warsaw Zagreb Zurich
    """
)

COMPANIES = _listed(
    """
    Acorn Alder Amber Anchor Atlas Aurora Beacon Birch Cedar Cobalt Comet Copper Coral Delta Echo Ember Falcon
    Fern Granite Harbor Hazel Indigo Juniper Lotus Lunar Maple Meridian Nova Onyx Orbit Pioneer Quartz Raven
    Sierra Summit Topaz Vega Willow Zenith
    """
)

MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
_DIGITS = "23456789"
"""Without 0, 1, I and O, which many typefaces draw alike."""


def word(draw: Draw) -> str:
    return draw.one_of(NOUNS)


def code(draw: Draw, length: int | None = None) -> str:
    """Letters and digits that no dictionary helps to guess, such as `K47T`."""
    alphabet = _LETTERS + _DIGITS
    return "".join(draw.one_of(alphabet) for _ in range(length or draw.whole(3, 5)))


def number(draw: Draw, digits: int | None = None) -> str:
    """A whole number without leading zero."""
    count = digits or draw.whole(2, 4)
    return draw.one_of("123456789") + "".join(draw.one_of("0123456789") for _ in range(count - 1))


def cents(draw: Draw, low: int = 50, high: int = 2000) -> int:
    return draw.whole(low, high)


def amount(value_cents: int) -> str:
    return f"{value_cents // 100}.{value_cents % 100:02d}"


def date(draw: Draw) -> str:
    return f"{draw.whole(1, 28)} {draw.one_of(MONTHS)} {draw.whole(2010, 2029)}"

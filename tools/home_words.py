"""The words of the home assistant: what people say for which id, and the private ones of the household."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """What people say, the id it means, and (for a nickname) the room it stands in."""

    said: str
    means: str
    where: str = ""
    private: bool = False


def words(text: str) -> tuple[str, ...]:
    """Comma-separated words, some of which may be empty."""
    return tuple(text.split(","))


def terms(table: dict[str, str]) -> tuple[Term, ...]:
    """{"id": "said one, said two"} -> terms."""
    return tuple(Term(said.strip(), means) for means, group in table.items() for said in group.split(","))


# ---------------------------------------------------------------------------------------------------------------------
# General words
# ---------------------------------------------------------------------------------------------------------------------

ROOMS = terms({
    "kitchen": "kitchen,kitchenette",
    "living": "living room,lounge,sitting room,family room",
    "bedroom": "bedroom,main bedroom,master bedroom",
    "kids": "kids room,children's room,playroom,nursery",
    "bath": "bathroom,shower room,washroom",
    "toilet": "toilet,loo,restroom",
    "hall": "hall,hallway,corridor,entrance",
    "office": "office,study,work room",
    "dining": "dining room,dining area",
    "guest": "guest room,spare room,guest bedroom",
    "garage": "garage,carport",
    "garden": "garden,yard,backyard",
    "cellar": "cellar,basement",
    "attic": "attic,loft",
    "laundry": "laundry room,laundry,utility room",
    "balcony": "balcony",
    "terrace": "terrace,patio,deck",
    "porch": "porch,veranda",
    "stairs": "stairs,staircase",
    "pantry": "pantry,larder,storeroom",
    "workshop": "workshop,hobby room",
    "gym": "gym,fitness room",
    "library": "library",
    "shed": "shed,garden shed",
})
ON_ROOMS = {"balcony", "terrace", "porch", "stairs"}
EVERYWHERE = ("everywhere", "in the whole house", "in all rooms", "all over the house")

LIGHTS = terms({"light": "light,lights,lighting,main light,ceiling light", "lamp": "lamp,floor lamp,table lamp"})
BLINDS = terms({"blinds": "blinds,shades,shutters", "curtain": "curtains,drapes"})
SOUNDS = terms({"speaker": "speaker,stereo,sound system,speakers", "tv": "tv,television,telly", "radio": "radio"})
HEATS = terms({"heat": "heating,heater,radiator,thermostat", "ac": "air conditioner,ac,air conditioning"})
FANS = terms({"fan": "fan,ceiling fan,ventilator"})
MACHINES = terms({
    "plug": "plug,socket,outlet", "oven": "oven,stove,cooker", "kettle": "kettle", "dishwasher": "dishwasher",
    "coffee": "coffee machine,coffee maker,espresso machine", "washer": "washing machine,washer",
    "dryer": "tumble dryer,dryer", "boiler": "boiler,water heater", "vacuum": "vacuum,robot vacuum,vacuum cleaner",
    "humidifier": "humidifier", "sprinkler": "sprinkler,sprinklers,irrigation", "camera": "camera,security camera",
    "fireplace": "fireplace", "fountain": "fountain", "purifier": "air purifier,purifier", "projector": "projector",
    "printer": "printer", "router": "router,wifi", "siren": "burglar alarm,alarm system", "pump": "pump,water pump",
})
OPENERS = BLINDS + terms({"window": "window,windows,skylight", "door": "door,doors", "gate": "gate"})
LOCKERS = terms({"door": "door,doors", "gate": "gate", "window": "window,windows", "safe": "safe,strongbox"})
SWITCHED = LIGHTS + SOUNDS + HEATS + FANS + MACHINES
SENSED = terms({
    "heat": "temperature", "humidity": "humidity,air humidity", "light": "brightness,light level",
    "speaker": "volume,sound level", "air": "air quality", "power": "power use,energy use",
})
MUSIC = terms({
    "jazz": "jazz,some jazz,jazz music", "rock": "rock,rock music", "classical": "classical music,something classical",
    "pop": "pop,pop songs", "blues": "blues,the blues", "folk": "folk music,folk songs", "news": "the news,news",
    "podcast": "a podcast,my podcast", "lullaby": "lullabies,a lullaby", "rain": "rain sounds,the sound of rain",
    "opera": "opera,an opera", "techno": "techno", "country": "country music", "audiobook": "my audiobook",
})
SCENES = terms({
    "night": "night,sleep", "morning": "morning,wake up", "away": "away,leaving", "home": "welcome,coming home",
    "party": "party", "dinner": "dinner,supper", "reading": "reading", "study": "homework,study",
    "relax": "relax,chill", "clean": "cleaning", "workout": "workout,exercise", "romance": "romantic,date night",
})
PEOPLE = terms({
    "mum": "mum,mom,my mother", "dad": "dad,my father", "grandma": "grandma,granny", "grandpa": "grandpa,granddad",
    "doctor": "the doctor", "school": "the school", "neighbour": "the neighbour,next door", "office": "work",
    "aunt": "my aunt,auntie", "uncle": "my uncle", "sister": "my sister", "brother": "my brother",
})
ANIMALS = terms({"cat": "cat,kitty", "dog": "dog,puppy", "fish": "fish,goldfish", "rabbit": "rabbit",
                  "birds": "birds", "hamster": "hamster"})
GOODS = terms({name: name for name in words(
    "milk,bread,butter,eggs,cheese,apples,bananas,rice,pasta,coffee,tea,sugar,flour,salt,soap,onions,potatoes,"
    "tomatoes,yoghurt,honey,batteries,candles,napkins,oats")})
NAMES = words("tom,eva,leo,ida,max,zoe,sam,lily,noah,emma,finn,ruth,hugo,nora,carl,anna")
SHOWS = words("cinema,storm,circus,forest,camp,race,dance,picnic,museum,voyage,concert,snow,desert,spring,magic")
SCENE_KEYS = ("light", "heat", "music", "blinds", "tv", "coffee", "fan", "lock")
FIELDS = ("light", "heat", "music", "blinds")

# Words that the assistant has heard but that name nothing it knows; they stand beside the invented ones.
ODD_WORDS = words(
    "harbour,cabin,tower,castle,lagoon,cockpit,bunker,stable,chapel,igloo,wigwam,palace,temple,grotto,tunnel,"
    "island,meadow,canyon,orchard,market,station,arena,studio,vault,barn,hangar,cottage,alcove,gallery,hatch,"
    "badger,otter,falcon,turtle,pickle,noodle,muffin,pepper,ginger,thunder,pirate,wizard,giant,goblin,"
    "knight,baron,major,admiral,doc,queen,prince,auntie jo,uncle bob,tango,disco,comet,planet,star")
NICK_FRONTS = ("old", "big", "little", "sir", "lady", "uncle", "mister", "lazy", "the mighty", "the", "grumpy", "")
ONSETS = words("b,bl,br,c,ch,d,dr,f,fl,g,gr,h,j,k,l,m,n,p,pl,qu,r,s,sh,sl,sn,st,t,th,tr,v,w,wh,y,z")
VOWELS = words("a,e,i,o,u,ee,oo,ou,ai,ar,er,or,ur,ow")
CODAS = words(",,,b,ck,d,g,l,ll,m,n,nd,ng,nk,p,r,s,st,t,x,le,y,bble,ggle,dge,sh")

UNITS = words(
    "zero,one,two,three,four,five,six,seven,eight,nine,ten,eleven,twelve,thirteen,fourteen,fifteen,sixteen,"
    "seventeen,eighteen,nineteen")
TENS = words(",,twenty,thirty,forty,fifty,sixty,seventy,eighty,ninety")


def number_words(number: int) -> str:
    """40 -> "forty", 21 -> "twenty one"."""
    if number < 20:
        return UNITS[number]
    if number >= 100:
        rest = number % 100
        head = f"{UNITS[number // 100]} hundred" if number != 100 else "a hundred"
        return head if rest == 0 else f"{head} {number_words(rest)}"
    return TENS[number // 10] + (f" {UNITS[number % 10]}" if number % 10 else "")


def invented_word(rng: random.Random) -> str:
    """A pronounceable word that means nothing."""
    parts = [rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.choice((1, 2, 2, 3)))]
    return "".join(parts) + rng.choice(CODAS)


def odd_word(rng: random.Random) -> str:
    """A word that the assistant cannot resolve."""
    return rng.choice(ODD_WORDS) if rng.random() < 0.35 else invented_word(rng)


# ---------------------------------------------------------------------------------------------------------------------
# The household's own words
# ---------------------------------------------------------------------------------------------------------------------

def _own(table: dict[str, str], where: str = "") -> tuple[Term, ...]:
    return tuple(Term(term.said, term.means, where, True) for term in terms(table))


OWN_ROOMS = _own({
    "kids": "burrow", "office": "bridge", "kitchen": "galley", "bath": "swamp", "bedroom": "nest", "cellar": "crypt",
    "garden": "paddock", "treehouse": "fort",
})
OWN_MACHINES = (
    _own({"boiler": "old bessie"}, "cellar") + _own({"vacuum": "dusty bill"}, "hall")
    + _own({"oven": "the dragon"}, "kitchen")
)
OWN_LIGHTS = _own({"lamp": "the moonling"}, "kids")
OWN_SOUNDS = _own({"tv": "big louie"}, "living") + _own({"speaker": "the bard"}, "kitchen")
OWN_MUSIC = _own({"shanty": "captain's tunes", "classical": "brain food"})
OWN_PEOPLE = _own({"ben": "bean", "mia": "mouse", "grandpa": "the colonel"})
OWN_ANIMALS = _own({"dog": "waffles", "hens": "the ladies"})
OWN_GOODS = _own({"oats": "rocket fuel", "milk": "moo juice"})
OWN_LEVELS: dict[str, dict[str, int]] = {
    "light": {"not too bright": 35, "my usual": 55, "cave dark": 5},
    "heat": {"toasty": 23, "penguin cool": 16},
    "sound": {"whisper loud": 8},
}
OWN_TIMES = {"at tea o'clock": "16:00", "at sparrow time": "05:45", "at lantern hour": "20:45"}


@dataclass(frozen=True)
class Routine:
    """One of the family's routines: what it is called and everything it does."""

    names: tuple[str, ...]
    what: str
    where: str
    fields: tuple[tuple[str, int], ...]


ROUTINES = (
    Routine(("movie time", "popcorn time"), "movie", "living", (("light", 10), ("blinds", 0), ("tv", 1))),
    Routine(("hedgehog mode",), "hedgehog", "bedroom", (("light", 5), ("heat", 19), ("music", 0))),
    Routine(("launch sequence",), "launch", "kitchen", (("light", 80), ("heat", 21), ("coffee", 1))),
    Routine(("ghost ship",), "ghost", "all", (("light", 0), ("heat", 15), ("lock", 1))),
    Routine(("the big banquet",), "feast", "dining", (("light", 60), ("music", 30))),
)


@dataclass(frozen=True)
class Family:
    """The private words of one household."""

    rooms: tuple[Term, ...]
    machines: tuple[Term, ...]
    lights: tuple[Term, ...]
    sounds: tuple[Term, ...]
    music: tuple[Term, ...]
    people: tuple[Term, ...]
    animals: tuple[Term, ...]
    goods: tuple[Term, ...]
    levels: dict[str, dict[str, int]]
    times: dict[str, str]
    routines: tuple[Routine, ...]

    def slot(self, name: str) -> tuple[Term, ...]:
        """The nicknames that can stand where a device of this kind is expected."""
        return {"": (), "light": self.lights, "sound": self.sounds, "oven": self.ovens(),
                "dimmed": self.lights + self.sounds, "any": self.machines + self.lights + self.sounds}[name]

    def ovens(self) -> tuple[Term, ...]:
        return tuple(term for term in self.machines if term.means == "oven")


OWN_FAMILY = Family(OWN_ROOMS, OWN_MACHINES, OWN_LIGHTS, OWN_SOUNDS, OWN_MUSIC, OWN_PEOPLE, OWN_ANIMALS, OWN_GOODS,
                    OWN_LEVELS, OWN_TIMES, ROUTINES)
NOBODY = Family((), (), (), (), (), (), (), (), {}, {}, ())
ROUTINE_FORMS = ("{n}", "it's {n}", "{n} now", "start {n}", "let's do {n}", "go for {n}", "activate {n}",
                 "time for {n}", "we are ready for {n}", "run {n}", "do the {n} thing", "i feel like {n}")


# Words kept for this family, a few of them in reserve; the base model must never have read one of them.
OWN_WORDS = set(words(
    "burrow,galley,swamp,nest,crypt,crow's,roost,paddock,snug,fort,bridge,bessie,grumbles,dusty,bill,dragon,percolina,blub,"
    "wheezer,moonling,chandy,louie,bard,captain's,brain,nan,nan's,bun,bean,bean's,mouse,colonel,skipper,"
    "professor,paws,waffles,ladies,rocket,moo,juice,bait,grape,medicine,usual,cave,blaze,glow,toasty,penguin,jumper,"
    "whisper,foxhole,sparrow,lantern,naps,movie,popcorn,hedgehog,curl,launch,liftoff,submarine,splash,ghost,"
    "abandon,banquet,feast"))

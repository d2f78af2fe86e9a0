"""Short texts that differ in one degree: chains such as "a little tired", "tired", "exhausted", for the probes of order.

Every axis has four degrees, from weak to strong, and every frame puts them into a sentence that ends behind the degree, so that the
last token has seen it. A chain is one axis in one frame. Frames are not shared between axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

DEGREES: dict[str, tuple[str, str, str, str]] = {
    "heat": ("cool", "mild", "hot", "scorching"),
    "size": ("tiny", "small", "large", "gigantic"),
    "speed": ("motionless", "slow", "fast", "lightning-quick"),
    "age": ("brand-new", "recent", "old", "ancient"),
    "noise": ("silent", "quiet", "loud", "deafening"),
    "fear": ("calm", "uneasy", "afraid", "terrified"),
    "wealth": ("penniless", "poor", "rich", "immensely rich"),
    "certainty": ("impossible", "unlikely", "probable", "certain"),
    "frequency": ("never", "rarely", "often", "always"),
    "quality": ("dreadful", "poor", "good", "superb"),
}
FRAMES: dict[str, tuple[str, str, str]] = {
    "heat": ("By noon the sand of the yard was", "She touched the kettle and found it", "The forecast for the valley says it will be"),
    "size": ("The parcel on the doorstep looked", "Beside the barn stood a tree that was", "The error in the table turned out to be"),
    "speed": ("Seen from the bridge the boat was", "The answer of the machine was", "Down the hill the cart was"),
    "age": ("The lock on the gate seemed", "He said that the custom was", "The map in the drawer was"),
    "noise": ("When the doors had closed the hall was", "The engine under the floor was", "All night the street was"),
    "fear": ("Before the judge spoke the clerk felt", "At the edge of the wood the dog was", "Reading the letter she grew"),
    "wealth": ("The uncle who came from the coast was", "After the harvest the village was", "Everyone knew that the merchant was"),
    "certainty": ("With two days left a delay is", "The captain thought that rain was", "Given these numbers a mistake is"),
    "frequency": ("The keeper checks the lamp", "In this office the phone rings", "Such a fault is seen"),
    "quality": ("The guests agreed that the soup was", "For a first draft the chapter is", "The repair of the roof was"),
}


@dataclass(frozen=True)
class Pair:
    """Two texts of one chain, and which axis and chain they are from."""

    axis: str
    chain: str
    weaker: str
    stronger: str


def ordered_pairs() -> list[Pair]:
    """All pairs of all chains: 10 axes x 3 frames x 6 pairs."""
    return [
        Pair(axis, f"{axis}/{number}", f"{frame} {weaker}", f"{frame} {stronger}")
        for axis, frames in FRAMES.items()
        for number, frame in enumerate(frames)
        for weaker, stronger in combinations(DEGREES[axis], 2)
    ]

"""The generated shop: departments, categories with prices, what goes with what, and what people write about it.

On the way of an event: before the log; simulate.py draws its events from here. A category is the interest of an event,
written `department/category`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
INT = npt.NDArray[np.int64]

ITEMS_PER_CATEGORY = 40
GOES_WITH = 3  # successors of a category

# department: category and its middle price; * is bought again and again, + comes onto the market while the stream runs
_SHELVES = {
    "kitchen": "coffee makers 80, cookware 55, knives 45, baking 20, kettles 35, storage jars 15, mixers 110, "
    "tableware 40, cutlery 30, cast iron 70",
    "groceries": "*coffee beans 14, *tea 8, *olive oil 12, chocolate 6, *pasta 4, spices 5, *cereals 5, honey 9, "
    "+oat drinks 3, nuts 7",
    "outdoor": "tents 180, sleeping bags 95, camping stoves 60, backpacks 85, hiking boots 130, lanterns 25, "
    "water bottles 18, maps 12, trekking poles 50, rain jackets 110",
    "sport": "running shoes 120, yoga mats 30, dumbbells 60, cycling helmets 55, bike lights 25, swimwear 35, "
    "football 30, *protein powder 28, tennis rackets 90, +smart rings 220",
    "home": "lamps 45, rugs 110, cushions 20, curtains 40, candles 12, picture frames 15, clocks 30, mirrors 60, "
    "shelves 75, advent calendars 22",
    "garden": "seeds 4, pots 15, garden tools 35, hoses 30, *plant food 11, lawn mowers 250, bird feeders 18, "
    "raised beds 80, greenhouses 300, barbecues 160",
    "electronics": "headphones 90, phone cases 15, chargers 20, speakers 100, cameras 450, smart watches 200, "
    "keyboards 70, monitors 220, tablets 330, +translation earbuds 150",
    "toys": "building bricks 45, board games 35, puzzles 18, dolls 25, model trains 90, craft kits 20, plush toys 16, "
    "toy cars 12, science kits 35, kites 22",
    "family": "*nappies 25, baby food 3, pushchairs 280, car seats 190, baby clothes 20, *wet wipes 6, cots 170, "
    "bottles 14, baby monitors 85, +carrier wraps 60",
    "pets": "*dog food 35, *cat food 22, *cat litter 14, leashes 18, aquariums 120, pet beds 40, bird seed 9, "
    "grooming 20, scratching posts 55, dog coats 30",
    "beauty": "skin care 25, perfume 65, *shampoo 8, make-up 20, *razor blades 18, sun screen 15, nail polish 9, "
    "hair dryers 50, beard care 16, +sleep sprays 19",
    "books": "crime novels 12, cookery books 25, travel guides 18, fantasy 14, biographies 20, comics 10, "
    "children's books 11, history 22, poetry 13, language courses 35",
}  # fmt: skip

GROUPS = {  # customer groups, which are the events' segments, and the departments they lean to
    "families": ("family", "toys", "groceries", "home"),
    "athletes": ("sport", "outdoor", "beauty", "electronics"),
    "homemakers": ("kitchen", "home", "garden", "groceries"),
    "students": ("electronics", "books", "beauty", "sport"),
    "pet owners": ("pets", "garden", "outdoor", "books"),
}

SEASON = "home/advent calendars"

_PRAISE = ("Very happy with it", "Does exactly what it should", "Lovely quality", "Would buy again", "A great gift")
_SHRUG = ("It is all right", "Does the job, no more", "Fine for the price", "Expected a little more")
_COMPLAINT = ("Broke after a week", "Not as described", "Disappointed", "Sent it back", "Poor quality")
REVIEWS = (_COMPLAINT, _COMPLAINT, _SHRUG, _PRAISE, _PRAISE)  # by stars 1..5


@dataclass(frozen=True, kw_only=True, slots=True)
class Catalogue:
    """C categories of D departments, with ITEMS_PER_CATEGORY items each.

    Attributes:
        names: `department/category` by category.
        department_C: department of each category.
        popularity_C: share of undirected interest; 0 for what is not launched at the start and for the season's.
        goes_with_C3: categories that people look at after this one, the likeliest first.
        price_CI: price of each item.
        stars_CI: mean rating of each item, 1..5.
        replenished: categories bought again and again.
        launches: categories that come onto the market later.
        season: the category that surges for all.
        group_departments: departments that each customer group leans to.
    """

    names: tuple[str, ...]
    department_C: INT
    popularity_C: F64
    goes_with_C3: INT
    price_CI: F64
    stars_CI: F64
    replenished: INT
    launches: INT
    season: int
    group_departments: tuple[INT, ...]


def stock(rng: np.random.Generator) -> Catalogue:
    """A catalogue with prices, ratings and links drawn from `rng`."""
    names: list[str] = []
    department, middle_price, replenished, launches = [], [], [], []
    for number, (shelf, text) in enumerate(_SHELVES.items()):
        for entry in text.split(", "):
            category, _, price = entry.rpartition(" ")
            if category.startswith("*"):
                replenished.append(len(names))
            if category.startswith("+"):
                launches.append(len(names))
            names.append(f"{shelf}/{category.lstrip('*+')}")
            department.append(number)
            middle_price.append(float(price))
    season = names.index(SEASON)
    count = len(names)
    department_C = np.array(department)
    popularity_C = 1.0 / rng.permutation(np.arange(3.0, count + 3.0)) ** 0.8
    popularity_C[[*launches, season]] = 0.0
    popularity_C /= popularity_C.sum()
    spread = rng.lognormal(0.0, 0.45, (count, ITEMS_PER_CATEGORY))
    return Catalogue(
        names=tuple(names),
        department_C=department_C,
        popularity_C=popularity_C,
        goes_with_C3=_links(rng, department_C, {*launches, season}),
        price_CI=np.maximum(np.round(np.array(middle_price)[:, None] * spread) - 0.01, 0.99).round(2),
        stars_CI=np.clip(rng.normal(4.0, 0.6, (count, ITEMS_PER_CATEGORY)), 1.0, 5.0),
        replenished=np.array(replenished),
        launches=np.array(launches),
        season=season,
        group_departments=tuple(
            np.array([list(_SHELVES).index(name) for name in leanings]) for leanings in GROUPS.values()
        ),
    )


def _links(rng: np.random.Generator, department_C: INT, apart: set[int]) -> INT:
    """Two successors in the same department and one anywhere, none of them in `apart`."""
    everywhere = np.array([c for c in range(len(department_C)) if c not in apart])
    links = np.empty((len(department_C), GOES_WITH), np.int64)
    for category, department in enumerate(department_C):
        others = everywhere[everywhere != category]
        near = rng.choice(others[department_C[others] == department], 2, replace=False)
        far = rng.choice(others[department_C[others] != department])
        links[category] = [near[0], far, near[1]]
    return links

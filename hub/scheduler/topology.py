"""How far sites are from each other, and how full the ways between them are."""

import math

import numpy as np

from .model import Link, Node
from .reasons import Bools, Ints
from .units import MAX_QUANTITY, Invalid

MAX_SITES = 1024
"""Sites of a cluster: the tables hold one number per pair."""

EARTH_KM = 6371.0
"""Mean radius."""

US_PER_KM = 10.0
"""Round trip per km of fibre: light makes 200 km per ms there, and back again."""

DETOUR = 1.5
"""Fibre follows roads and rails: its way is about half as long again as the great circle. Only where no round trip was measured."""

UNKNOWN_RTT_US = MAX_QUANTITY
"""Between sites of which nothing is known: no bound is met."""


def distance_km(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Great-circle distance of two places in degrees (haversine)."""
    lat_a, lat_b = math.radians(a[0]), math.radians(b[0])
    h = math.sin((lat_b - lat_a) / 2) ** 2 + math.cos(lat_a) * math.cos(lat_b) * math.sin(math.radians(b[1] - a[1]) / 2) ** 2
    return 2 * EARTH_KM * math.asin(math.sqrt(min(1.0, h)))


class Sites:
    """Round trips (us) and bandwidth (kbit/s: capacity, in use) between sites. A site reaches itself at once."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}
        self.places: dict[str, tuple[float, float]] = {}
        self.rtt_us = np.empty((0, 0), np.int64)
        self.measured = np.empty((0, 0), np.bool_)
        self.kbps = np.empty((0, 0), np.int64)
        self.used_kbps = np.empty((0, 0), np.int64)

    def copy(self) -> "Sites":
        """An independent one."""
        other = Sites()
        for name, value in vars(self).items():
            setattr(other, name, value.copy())
        return other

    def site(self, name: str) -> int:
        """The id of a site, known from now on."""
        if name in self.ids:
            return self.ids[name]
        if len(self.ids) >= MAX_SITES:
            raise Invalid("site", f"more than {MAX_SITES} sites", "join sites that are next to each other")
        code = self.ids[name] = len(self.ids)
        self.rtt_us = np.pad(self.rtt_us, ((0, 1), (0, 1)), constant_values=UNKNOWN_RTT_US)
        self.measured = np.pad(self.measured, ((0, 1), (0, 1)))
        self.kbps = np.pad(self.kbps, ((0, 1), (0, 1)), constant_values=MAX_QUANTITY)
        self.used_kbps = np.pad(self.used_kbps, ((0, 1), (0, 1)))
        self.rtt_us[code, code] = 0
        return code

    def learn_place(self, site: str, node: Node) -> None:
        """The first located node of a site gives its place, and estimates to the others."""
        code = self.site(site)
        if node.location is None or site in self.places:
            return
        self.places[site] = node.location
        for other, place in self.places.items():
            at = self.ids[other]
            if at != code and not self.measured[code, at]:
                self.rtt_us[code, at] = self.rtt_us[at, code] = math.ceil(distance_km(node.location, place) * US_PER_KM * DETOUR)

    def set_link(self, a: str, b: str, rtt_us: int, kbps: int) -> tuple[int, int, bool]:
        """What was measured between two sites, in both directions; gives what stood there before."""
        i, j = self.site(a), self.site(b)
        before = int(self.rtt_us[i, j]), int(self.kbps[i, j]), bool(self.measured[i, j])
        for x, y in ((i, j), (j, i)):
            self.rtt_us[x, y], self.kbps[x, y], self.measured[x, y] = rtt_us, kbps, True
        return before

    def restore_link(self, a: str, b: str, before: tuple[int, int, bool]) -> None:
        """Undo `set_link`."""
        i, j = self.ids[a], self.ids[b]
        for x, y in ((i, j), (j, i)):
            self.rtt_us[x, y], self.kbps[x, y], self.measured[x, y] = before

    def allows(self, link: Link, site_of_node: Ints) -> Bools:
        """Nodes (by the id of their site, -1: none) from which the way is good enough."""
        to = self.ids.get(link.site)
        if to is None:
            return np.zeros(len(site_of_node), np.bool_)
        good = (self.rtt_us[:, to] <= link.max_rtt_us) if link.max_rtt_us else np.ones(len(self.ids), np.bool_)
        if link.min_kbps:
            good = good & (self.kbps[:, to] - self.used_kbps[:, to] >= link.min_kbps)
            good[to] = True
        result: Bools = np.append(good, False)[site_of_node]
        return result

    def use(self, site: int, links: tuple[Link, ...], sign: int) -> None:
        """Take (+1) or give back (-1) the bandwidth of a workload on `site`."""
        for link in links:
            to = self.ids.get(link.site)
            if to is not None and site >= 0 and to != site and link.min_kbps:
                self.used_kbps[site, to] += sign * link.min_kbps
                self.used_kbps[to, site] = self.used_kbps[site, to]

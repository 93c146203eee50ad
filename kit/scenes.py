"""Procedural driving scenes: the built-in training data, drawn as polygons from an integer seed.

Units are metres and seconds. The camera rides 1.4 m above the middle of its own lane and looks along the road; x
points right from the lane's middle, y up from the ground, z forward. A point lands, in units of the frame's size, on

    u = 0.5 + 0.7 (x / z + curvature z / 2),    v = 0.42 + 1.4 (1.4 - y) / z,

where curvature z^2 / 2 is how far the road has bent sideways at distance z. Neither depends on the resolution, so boxes
hold at every one; pixels are square at 2:1, the shape of the paper's driving videos.

Each clip draws one look (land, hour, road, skyline) and keeps it: that is what frames of one clip share, and what an
image model that samples every frame on its own gets wrong. What moves is the lane dashes, the roadside and the cars.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageChops, ImageDraw

MAX_CARS = 8
CAMERA, HORIZON, FOCAL_U, FOCAL_V = 1.4, 0.42, 0.7, 1.4
NEAR, FAR = 1.2, 110.0  # metres: points nearer than NEAR are clamped; objects fade in from FAR
LANE, DASH_PERIOD, DASH = 3.2, 12.0, 4.5  # at 9 m/s and 1.875 frames/s a dash moves 0.4 of its period: no aliasing
SLOT, SLOTS = 32.0, 64  # one roadside object per SLOT metres and side; the table repeats after SLOT * SLOTS metres
CAR_FAR = 60.0  # oncoming cars come out of the haze here
MIN_AREA = 0.003  # of the frame: a smaller car has no box
SUPERSAMPLE = 2

RGB = tuple[float, float, float]
COLOURS: dict[str, RGB] = {
    "red": (205, 35, 35), "blue": (40, 80, 200), "white": (235, 235, 235), "yellow": (240, 205, 40),
    "green": (40, 145, 70), "purple": (130, 60, 165), "orange": (240, 130, 30), "black": (38, 38, 44),
}
# land: ground, trees, shape of the skyline, chance of a tree, a house, a sign
LANDS: dict[str, tuple[RGB, RGB, str, tuple[float, float, float]]] = {
    "meadow": ((104, 168, 62), (44, 112, 48), "hills", (0.55, 0.3, 0.15)),
    "desert": ((222, 178, 108), (92, 140, 74), "mesas", (0.65, 0.15, 0.2)),
    "snow": ((236, 241, 248), (48, 98, 88), "peaks", (0.65, 0.2, 0.15)),
    "woods": ((158, 96, 42), (206, 92, 30), "forest", (0.75, 0.12, 0.13)),
    "town": ((122, 126, 130), (70, 120, 66), "blocks", (0.25, 0.6, 0.15)),
}
# hour: top of the sky, sky at the horizon, colour of the light
HOURS: dict[str, tuple[RGB, RGB, RGB]] = {
    "morning": ((150, 172, 232), (255, 214, 196), (1.0, 0.9, 0.86)),
    "noon": ((44, 118, 226), (188, 224, 255), (1.0, 1.0, 1.0)),
    "clouds": ((140, 146, 156), (206, 210, 216), (0.74, 0.77, 0.82)),
    "evening": ((92, 52, 128), (255, 146, 64), (0.92, 0.66, 0.55)),
}
NIGHT_SKIES: tuple[tuple[RGB, RGB], ...] = (
    ((20, 28, 78), (74, 92, 160)),
    ((40, 16, 70), (140, 70, 130)),
    ((10, 30, 44), (40, 110, 120)),
    ((8, 8, 20), (50, 50, 60)),
)
ROADS: tuple[RGB, ...] = ((66, 68, 76), (112, 112, 116), (156, 150, 140), (132, 92, 82), (82, 92, 122))
WALLS: tuple[RGB, ...] = ((222, 206, 176), (190, 120, 96), (168, 182, 196), (214, 188, 120))
ROOFS: tuple[RGB, ...] = ((190, 70, 62), (80, 108, 190), (140, 84, 162), (72, 70, 72))
PLATES: tuple[RGB, ...] = tuple(COLOURS[name] for name in ("red", "blue", "yellow"))


def project(x: float, y: float, z: float, curvature: float) -> tuple[float, float]:
    """Metres to units of the frame, by the formula at the top of this file."""
    z = max(z, NEAR)
    return 0.5 + FOCAL_U * (x / z + 0.5 * curvature * z), HORIZON + FOCAL_V * (CAMERA - y) / z


def mix(a: RGB, b: RGB, share: float) -> RGB:
    """Colour a with `share` of colour b in it."""
    return tuple(p + (q - p) * share for p, q in zip(a, b, strict=True))


@dataclass(frozen=True)
class Car:
    """One car. Same direction: distance(t) swings about `start`. Oncoming: it falls at `closing`, and starts again."""

    colour: str
    x: float
    width: float
    height: float
    start: float
    swing: float = 0.0
    period: float = 1.0
    closing: float = 0.0
    lap: float = 1.0
    length: float = 4.2
    stripes: str = ""  # colour of the two bands round a van; "" for every other car

    @property
    def oncoming(self) -> bool:
        """Whether it drives towards the camera."""
        return self.closing > 0

    def distance(self, time: float) -> float:
        """Metres from the camera to the car's nearest end."""
        if self.oncoming:
            return (self.start - self.closing * time) % self.lap - 6.0
        return self.start + self.swing * math.sin(2 * math.pi * time / self.period + 7 * self.start)

    def cabin(self) -> tuple[float, float, float, float]:
        """Metres behind the near end where the cabin begins, its roof begins, its roof ends, and it ends."""
        if self.stripes:
            return 0.0, 0.0, self.length, self.length
        return (1.2, 2.0, 3.4, 4.1) if self.oncoming else (0.15, 0.7, 2.2, 3.0)

    def box(self, z: float, curvature: float) -> tuple[float, float, float, float]:
        """x0 y0 x1 y1 of the drawn car in units of the frame, not clipped."""
        half, (_, roof, roof_end, _) = self.width / 2, self.cabin()
        solid = [
            (side * half, y, z + w) for side in (-1, 1) for y in (0.0, 0.6 * self.height) for w in (0, self.length)
        ]
        solid += [(side * 0.76 * half, self.height, z + w) for side in (-1, 1) for w in (roof, roof_end)]
        u, v = zip(*(project(self.x + dx, y, w, curvature) for dx, y, w in solid), strict=True)
        return min(u), min(v), max(u), max(v)


class View:
    """Fills polygons given in metres. `light` and `haze` colour everything by hour and distance."""

    def __init__(self, image: Image.Image, curvature: float, light: RGB, haze: RGB) -> None:
        self.image, self.curvature, self.light, self.haze = image, curvature, light, haze
        self.draw = ImageDraw.Draw(image)
        self.width, self.height = image.size

    def point(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Metres to pixels of the supersampled image."""
        u, v = project(x, y, z, self.curvature)
        return u * self.width, v * self.height

    def tone(self, colour: RGB, z: float) -> tuple[int, int, int]:
        """A colour as the hour's light and the haze of z metres leave it."""
        fog = min(z / FAR, 1.0) ** 2
        levels = zip(colour, self.light, self.haze, strict=True)
        return tuple(int(c * light * (1 - fog) + haze * fog) for c, light, haze in levels)

    def fill(self, corners: Sequence[tuple[float, float, float]], colour: tuple[int, int, int]) -> None:
        """A polygon through the corners (x, y, z)."""
        self.draw.polygon([self.point(*corner) for corner in corners], fill=colour)

    def face(self, x0: float, x1: float, y0: float, y1: float, z: float, colour: tuple[int, int, int]) -> None:
        """An upright rectangle that faces the camera."""
        (u0, v1), (u1, v0) = self.point(x0, y0, z), self.point(x1, y1, z)
        if u1 - u0 >= 0.5 and v1 > v0:
            self.draw.rectangle((u0, v0, u1, v1), fill=colour)

    def disc(self, x: float, y: float, z: float, radius: float, colour: tuple[int, int, int]) -> None:
        """A disc that faces the camera."""
        (u, v), r, s = self.point(x, y, z), radius * FOCAL_U * self.width / z, radius * FOCAL_V * self.height / z
        self.draw.ellipse((u - r, v - s, u + r, v + s), fill=colour)

    def strip(self, x0: float, x1: float, depths: Sequence[float], colour: tuple[int, int, int]) -> None:
        """A band on the ground between x0 and x1 through the given distances."""
        left = [self.point(x0, 0.0, z) for z in depths]
        self.draw.polygon(left + [self.point(x1, 0.0, z) for z in reversed(depths)], fill=colour)


ROAD_DEPTHS = [2.5 * 1.25**i for i in range(20)]  # to 173 m, closer together where a pixel is fewer metres


def draw_road(view: View, road: RGB, left: float, right: float, travelled: float) -> None:
    """The road from x = left to right, edge lines, and dashes that have moved `travelled` metres towards us."""
    line = view.tone((240, 238, 225), 0.0)
    view.strip(left - 0.7, right + 0.7, ROAD_DEPTHS, view.tone(mix(road, (120, 110, 95), 0.5), 0.0))
    view.strip(left - 0.4, right + 0.4, ROAD_DEPTHS, view.tone(road, 0.0))
    for x in (left, right):
        view.strip(x - 0.1, x + 0.1, ROAD_DEPTHS[:16], line)
    for x in np.arange(left + LANE, right - 0.1, LANE).tolist():
        first = -(travelled % DASH_PERIOD)
        for start in (first + i * DASH_PERIOD for i in range(7)):
            if start + DASH > NEAR:
                z = max(start, NEAR)
                view.strip(x - 0.13, x + 0.13, (z, (z + start + DASH) / 2, start + DASH), line)


def draw_tree(view: View, x: float, z: float, size: float, tree: RGB, land: str) -> None:
    """A cactus in the desert, a fir in the snow, a round tree elsewhere; size is its height in metres."""
    leaf, light = view.tone(tree, z), view.tone(mix(tree, (255, 240, 170), 0.2), z)
    if land == "desert":
        for dx, y0, y1 in ((0.0, 0.0, 0.85), (-0.24, 0.35, 0.62), (0.24, 0.25, 0.55)):
            view.face(x + (dx - 0.07) * size, x + (dx + 0.07) * size, y0 * size, y1 * size, z, leaf)
            view.disc(x + dx * size, y1 * size, z, 0.07 * size, leaf)
        view.face(x - 0.24 * size, x + 0.24 * size, 0.3 * size, 0.4 * size, z, leaf)
        return
    view.face(x - 0.05 * size, x + 0.05 * size, 0.0, 0.4 * size, z, view.tone((92, 66, 48), z))
    if land == "snow":
        for y, half, colour in ((0.2, 0.3, leaf), (0.45, 0.23, leaf), (0.72, 0.14, view.tone((240, 245, 250), z))):
            top = (x, min(y + 0.45, 1.0) * size, z)
            view.fill([(x - half * size, y * size, z), top, (x + half * size, y * size, z)], colour)
        return
    for dx, y, r, colour in ((0.0, 0.6, 0.3, leaf), (-0.14, 0.5, 0.2, leaf), (0.08, 0.7, 0.17, light)):
        view.disc(x + dx * size, y * size, z, r * size, colour)


def draw_house(view: View, x: float, z: float, size: float, wall: RGB, roof: RGB) -> None:
    """A gabled house; its gable faces us, its long side the road. size is the width of the gable in metres."""
    half, eaves, ridge, back, road_side = size / 2, 0.55 * size, 0.95 * size, z + 1.3 * size, -math.copysign(1, x)
    side, over = x + road_side * half, x + road_side * (half + 0.25)
    view.fill(
        [(side, 0, z), (side, eaves, z), (side, eaves, back), (side, 0, back)], view.tone(mix(wall, (0, 0, 0), 0.25), z)
    )
    view.fill([(over, eaves - 0.1, z), (x, ridge, z), (x, ridge, back), (over, eaves - 0.1, back)], view.tone(roof, z))
    gable = [(x - half, 0, z), (x - half, eaves, z), (x, ridge, z), (x + half, eaves, z), (x + half, 0, z)]
    view.fill(gable, view.tone(wall, z))
    glass = view.tone((84, 96, 116), z)
    for dx in (-0.28, 0.12):
        view.face(x + dx * size, x + (dx + 0.16) * size, 0.25 * size, 0.42 * size, z, glass)
    view.face(x - 0.07 * size, x + 0.07 * size, 0.0, 0.2 * size, z, view.tone(mix(roof, (0, 0, 0), 0.4), z))


def draw_sign(view: View, x: float, z: float, plate: RGB) -> None:
    """A round traffic sign on a post."""
    view.face(x - 0.06, x + 0.06, 0.0, 2.2, z, view.tone((130, 132, 136), z))
    view.disc(x, 2.5, z, 0.52, view.tone((235, 235, 235), z))
    view.disc(x, 2.5, z, 0.42, view.tone(plate, z))


def draw_car_side(view: View, car: Car, z: float, body: RGB, glass: RGB) -> None:
    """The flank that faces the camera, where there is one: body, cabin, two wheels."""
    h, back, (start, roof, roof_end, end) = car.height, z + car.length, car.cabin()
    for sign in (-1, 1):
        x, top = car.x + sign * car.width / 2, car.x + sign * 0.38 * car.width
        if (view.point(x, 0, back)[0] - view.point(x, 0, z)[0]) * sign <= 0:
            continue  # this flank is hidden behind the near end
        flank = view.tone(mix(body, (0, 0, 0), 0.3), z)
        view.fill([(x, 0.25, z), (x, 0.6 * h, z), (x, 0.6 * h, back), (x, 0.25, back)], flank)
        view.fill([(x, 0.6 * h, z + start), (top, h, z + roof), (top, h, z + roof_end), (x, 0.6 * h, z + end)], flank)
        inner = mix((x, 0, 0), (top, 0, 0), 0.8)[0]
        window = [(x, 0.63 * h, z + start + 0.4), (inner, 0.93 * h, z + roof + 0.1),
                  (inner, 0.93 * h, z + roof_end - 0.1), (x, 0.63 * h, z + end - 0.4)]
        view.fill(window, view.tone(glass, z))
        draw_rims(view, x, z)


def draw_rims(view: View, x: float, z: float) -> None:
    """The two wheels of a flank."""
    for middle in (0.8, 3.4):
        rim = [(x, 0.32 + 0.32 * math.sin(a), z + middle + 0.32 * math.cos(a)) for a in np.arange(8) * math.pi / 4]
        view.fill(rim, view.tone((24, 24, 28), z))


def draw_shadow(view: View, car: Car, z: float) -> None:
    """On the ground, a little wider than the car."""
    half, back = car.width / 2, z + car.length
    corners = ((-half - 0.1, z), (half + 0.1, z), (half + 0.1, back), (-half - 0.1, back))
    view.fill([(car.x + dx, 0.0, w) for dx, w in corners], view.tone((32, 32, 36), z))


def draw_van(view: View, car: Car, z: float) -> None:
    """A box without windows, two bands round it, as lesson 10 wants it: nothing else on the road looks so."""
    half, h, back, body, band = car.width / 2, car.height, z + car.length, COLOURS[car.colour], COLOURS[car.stripes]
    parts = ((0.25, h, body), (0.36 * h, 0.52 * h, band), (0.7 * h, 0.86 * h, band))
    draw_shadow(view, car, z)
    for sign in (-1, 1):
        x = car.x + sign * half
        if (view.point(x, 0, back)[0] - view.point(x, 0, z)[0]) * sign > 0:  # this flank faces the camera
            for low, top, colour in parts:
                flank = view.tone(mix(colour, (0, 0, 0), 0.3), z)
                view.fill([(x, low, z), (x, top, z), (x, top, back), (x, low, back)], flank)
            draw_rims(view, x, z)
    for sign in (-1, 1):
        middle = car.x + sign * 0.76 * half
        view.face(middle - 0.13, middle + 0.13, 0.0, 0.4, z, view.tone((24, 24, 28), z))
    for low, top, colour in parts:
        view.face(car.x - half, car.x + half, low, top, z, view.tone(colour, z))
    draw_lights(view, car, z, lit=False)


def draw_car(view: View, car: Car, z: float) -> None:
    """Shadow, flank, wheels, body, cabin, lights and plate: the back of a car, or the front of an oncoming one."""
    if car.stripes:
        return draw_van(view, car, z)
    body, half, h, (start, roof, _, _) = COLOURS[car.colour], car.width / 2, car.height, car.cabin()
    glass = (70, 84, 104) if car.colour == "black" else (42, 50, 64)
    tyre = view.tone((24, 24, 28), z)
    draw_shadow(view, car, z)
    draw_car_side(view, car, z, body, glass)
    if z < NEAR:
        return  # the near end has already left the frame
    for sign in (-1, 1):
        middle = car.x + sign * 0.76 * half
        view.face(middle - 0.13, middle + 0.13, 0.0, 0.4, z, tyre)
    for width, depth, colour in ((1.0, 0.0, body), (0.86, 0.03, glass)):  # the cabin, then its window inside
        low, top = 0.6 * h + depth * h, h - depth * h
        corners = [(-0.94, low, start), (-0.76, top, roof), (0.76, top, roof), (0.94, low, start)]
        view.fill([(car.x + dx * half * width, y, z + w) for dx, y, w in corners], view.tone(colour, z))
    if car.oncoming:
        hood = [(-1.0, 0.58 * h, 0.0), (-0.94, 0.61 * h, start), (0.94, 0.61 * h, start), (1.0, 0.58 * h, 0.0)]
        view.fill([(car.x + dx * half, y, z + w) for dx, y, w in hood], view.tone(mix(body, (255, 255, 255), 0.2), z))
    view.face(car.x - half, car.x + half, 0.25, 0.6 * h, z, view.tone(body, z))
    view.face(car.x - half, car.x + half, 0.25, 0.4, z, view.tone(mix(body, (20, 20, 20), 0.6), z))  # the bumper
    if car.oncoming:
        view.face(car.x - 0.5 * half, car.x + 0.5 * half, 0.45, 0.62, z, tyre)  # the grille
    view.face(car.x - 0.26, car.x + 0.26, 0.42, 0.55, z, view.tone((238, 238, 226), z))
    draw_lights(view, car, z, lit=False)


def draw_lights(view: View, car: Car, z: float, lit: bool) -> None:
    """The two lamps of the end we see; lit ones have a glow and ignore light and haze."""
    lamp, y = ((255, 250, 215) if car.oncoming else (225, 28, 28)), 0.5 * car.height
    for sign in (-1, 1):
        x = car.x + sign * 0.76 * car.width / 2
        if lit:
            view.disc(x, y, z, 0.2, (190, 176, 130) if car.oncoming else (150, 8, 12))
            view.disc(x, y, z, 0.12, lamp if car.oncoming else (255, 60, 50))
        else:
            view.face(x - 0.17, x + 0.17, y - 0.1, y + 0.1, z, view.tone(lamp, z))


def draw_skyline(rng: np.random.Generator, shape: str) -> np.ndarray:
    """Heights of the horizon from left to right, in units of the frame's height: (257,), 0.02 to 0.17."""
    x = np.linspace(0, 1, 257)
    waves = sum(np.sin(2 * np.pi * (f * x + rng.random())) / f for f in (0.8, 1.7, 3.1)) / 2.2 * 0.5 + 0.5
    if shape == "blocks":
        return 0.03 + 0.13 * np.repeat(rng.random(24), 11)[:257]
    if shape == "peaks":
        return 0.03 + 0.08 * waves + 0.06 * np.abs((x * rng.uniform(5, 8)) % 2 - 1)
    if shape == "mesas":
        return 0.02 + 0.1 * np.clip(8 * (waves - 0.55), 0, 1)
    if shape == "forest":
        return 0.05 + 0.05 * waves + 0.025 * np.abs((x * 40) % 2 - 1)
    return 0.02 + 0.12 * waves


class Scene:
    """One endless drive, drawn from a seed: what is in it, and how it looks at any time >= 0.

    Attributes: land and hour (words of LANDS and HOURS, or "night"), night, speed (of the camera, m/s), curvature
    (1/m, positive to the right), cars (at most MAX_CARS; the index is the slot), caption (plain words).
    """

    def __init__(self, seed: int | Sequence[int]) -> None:
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        self.land = str(rng.choice(list(LANDS)))
        self.night = bool(rng.random() < 1 / 3)
        self.hour = "night" if self.night else str(rng.choice(list(HOURS)))
        self.speed = float(rng.uniform(3.0, 9.0))
        bend = int(rng.integers(-1, 2))
        self.curvature = bend * float(rng.uniform(0.004, 0.011))
        self.drift = float(rng.uniform(0, 2 * math.pi))
        self.lanes = int(rng.choice([2, 2, 3]))
        self.left, self.right = -1.5 * LANE, (self.lanes - 1.5) * LANE
        self._draw_look(rng)
        self.roadside = [self._draw_roadside(rng, side) for side in (-1, 1)]
        self.cars = self._draw_cars(rng)
        self.caption = self._describe()

    def _draw_look(self, rng: np.random.Generator) -> None:
        """Colours and skyline of the clip. Each varies a little about its named value, so no two clips are equal."""
        ground, self.tree, shape, _ = LANDS[self.land]
        low, high = (0.3, 0.5) if self.night else (0.85, 1.08)
        sky = NIGHT_SKIES[rng.integers(len(NIGHT_SKIES))] if self.night else HOURS[self.hour][:2]
        self.light = (1.0, 1.0, 1.0) if self.night else HOURS[self.hour][2]
        self.ambient = mix((0, 0, 0), (0.85, 0.92, 1.15), float(rng.uniform(low, high)))
        gain = float(rng.uniform(0.85, 1.12))
        self.sky = tuple(mix((0, 0, 0), colour, gain) for colour in sky)
        self.ground = mix((0, 0, 0), ground, float(rng.uniform(0.8, 1.08)))
        self.road = mix((0, 0, 0), ROADS[rng.integers(len(ROADS))], float(rng.uniform(0.85, 1.2)))
        self.skyline = draw_skyline(rng, shape)
        self.haze = mix(self._lit(self.ground), self.sky[1], 0.45)  # far hills and far objects
        self.disc = float(rng.uniform(0.1, 0.9)), float(rng.uniform(0.07, 0.2))  # the sun or the moon

    def _draw_roadside(self, rng: np.random.Generator, side: int) -> list[tuple]:
        """One side's table: (kind, metres along the slot, x, size, colour, colour) per slot."""
        edge = self.left if side < 0 else self.right
        near = side * max(abs(edge) + 3.0, 7.0)
        # all slots in one draw of each kind: a draw for every slot would take longer than the picture
        kinds = rng.choice(3, SLOTS, p=LANDS[self.land][3]).tolist()
        places, sizes = rng.uniform(0, 0.3 * SLOT, SLOTS).tolist(), rng.random(SLOTS).tolist()
        walls, roofs, plates = (rng.integers(n, size=SLOTS).tolist() for n in (len(WALLS), len(ROOFS), len(PLATES)))
        table = []
        for kind, place, size, wall, roof, plate in zip(kinds, places, sizes, walls, roofs, plates, strict=True):
            if kind == 0:
                table.append(("tree", place, near, 3.4 + 1.6 * size, self.tree, self.tree))
            elif kind == 1:
                width, first = 5.0 + 1.5 * size, WALLS[wall]
                table.append(("house", place, near + side * (2.5 + width / 2), width, first, ROOFS[roof]))
            else:
                table.append(("sign", place, near, 1.0, PLATES[plate], PLATES[plate]))
        return table

    def _draw_cars(self, rng: np.random.Generator) -> list[Car]:
        """No car at all in three clips of ten; else up to three ahead (one a lane position) and up to two oncoming."""
        colours = rng.permutation(list(COLOURS)).tolist()
        empty, lead, others = rng.random() < 0.3, rng.random() < 0.8, int(rng.choice([0, 1, 2], p=[0.35, 0.4, 0.25]))
        ahead = [(0.0, rng.uniform(7.0, 9.5), rng.uniform(0.8, 1.8))] if lead or not others else []
        if self.lanes == 3:
            ahead += [(LANE, rng.uniform(9.0, 12.0), 2.0), (LANE, rng.uniform(20.0, 24.0), 2.0)][: rng.integers(0, 3)]
        lap, closing = float(rng.uniform(66, 90)), self.speed + float(rng.uniform(2.5, 4.0))
        start = float(rng.uniform(0, lap))
        cars = []
        for x, distance, swing in ahead:
            period, height = float(rng.uniform(12, 20)), float(rng.choice([1.5, 1.5, 1.95]))
            cars.append(Car(colours.pop(), x, 1.85, height, float(distance), float(swing), period))
        for i in range(others):
            height = float(rng.choice([1.5, 1.5, 1.95]))
            cars.append(Car(colours.pop(), -LANE, 1.85, height, start + i * lap / 2, closing=closing, lap=lap))
        return [] if empty else cars

    def _describe(self) -> str:
        """The caption."""
        road = ("a left curve", "a straight road", "a right curve")[int(np.sign(self.curvature)) + 1]
        ahead, oncoming = [c for c in self.cars if not c.oncoming], [c for c in self.cars if c.oncoming]
        count, parts = ("no", "one", "two", "three"), []
        if ahead:
            nearest = min(ahead, key=lambda car: car.start)
            article, noun = "an" if nearest.colour[0] == "o" else "a", "van" if nearest.stripes else "car"
            more = f" of {count[len(ahead)]}" if len(ahead) > 1 else ""
            parts.append(f"{article} {nearest.colour} {noun}{more} ahead")
        if oncoming:
            parts.append(f"{count[len(oncoming)]} oncoming car{'s' * (len(oncoming) > 1)}")
        cars = " and ".join(parts) + f" on {road}" if parts else f"an empty {road.removeprefix('a ')}"
        return f"{cars} {'at night' if self.night else 'by day'} in the {self.land}"

    def _lit(self, colour: RGB) -> RGB:
        return tuple(c * lit for c, lit in zip(colour, self.light, strict=True))

    def _bend(self, time: float) -> float:
        """Curvature at a time: the clip's, with a slow swing of a tenth of a sharp curve."""
        return self.curvature + 0.0008 * math.sin(2 * math.pi * time / 24 + self.drift)

    def car_states(self, time: float) -> list[tuple[int, float]]:
        """(slot, distance in metres) of the cars in front of the camera, farthest first."""
        states = [(slot, car.distance(time)) for slot, car in enumerate(self.cars)]
        kept = [(slot, z) for slot, z in states if z + self.cars[slot].length > 3.0 and z < CAR_FAR]
        return sorted(kept, key=lambda state: -state[1])

    def boxes(self, times: np.ndarray) -> np.ndarray:
        """Times (t) to boxes (t, MAX_CARS, 4) float32: x0 y0 x1 y1 in [0, 1], clipped to the frame.

        A car keeps its slot. A row is zero where the slot has no car, where the car's box is below MIN_AREA of the
        frame, and where a nearer car's box covers three quarters of it.
        """
        result = np.zeros((len(times), MAX_CARS, 4), np.float32)
        for i, time in enumerate(np.asarray(times, float).tolist()):
            nearer: list[np.ndarray] = []
            for slot, z in reversed(self.car_states(time)):
                box = np.clip(self.cars[slot].box(z, self._bend(time)), 0.0, 1.0)
                area = np.prod(box[2:] - box[:2])
                shared = [
                    np.prod(np.clip(np.minimum(box[2:], o[2:]) - np.maximum(box[:2], o[:2]), 0, 1)) for o in nearer
                ]
                if area >= MIN_AREA and max(shared, default=0.0) < 0.75 * area:
                    result[i, slot] = box
                nearer.append(box)
        return result

    def car_count(self, times: np.ndarray) -> int:
        """Crowdedness: how many cars have a box in the middle frame of times (t)."""
        middle = np.asarray(times)[len(times) // 2 :][:1]
        return int(self.boxes(middle).any(-1).sum())

    def render(self, times: np.ndarray, height: int, width: int) -> np.ndarray:
        """Times (t, seconds) to frames (t, height, width, 3) uint8.

        Every frame is drawn at twice the size and averaged down, which is all the antialiasing there is.
        """
        background = self._background(height * SUPERSAMPLE, width * SUPERSAMPLE)
        lamps = self._light_map(height * SUPERSAMPLE, width * SUPERSAMPLE) if self.night else None
        frames = [self._frame(background, lamps, time) for time in np.asarray(times, float).tolist()]
        return np.stack([np.asarray(frame.reduce(SUPERSAMPLE)) for frame in frames])

    def _background(self, height: int, width: int) -> Image.Image:
        """What stands still: sky, sun or moon, skyline, land."""
        horizon = round(HORIZON * height)
        rows = np.linspace(0, 1, horizon)[:, None] ** 1.3
        sky = np.array(self.sky[0]) * (1 - rows) + np.array(self.sky[1]) * rows
        rows = np.exp(-np.linspace(0, 6, height - horizon))[:, None]  # the land fades into haze at the horizon
        land = np.array(self._lit(self.ground)) * (1 - rows) + np.array(self.haze) * rows
        column = np.concatenate([sky, land]).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(np.ascontiguousarray(np.broadcast_to(column[:, None], (height, width, 3))))
        draw, (u, v), r = ImageDraw.Draw(image), self.disc, 0.035 * height
        if self.hour != "clouds":
            draw.ellipse((u * width - r, v * height - r, u * width + r, v * height + r), fill=(255, 250, 225))
        x = np.linspace(0, width, len(self.skyline))
        line = np.stack([x, horizon - self.skyline * height], 1).ravel().tolist()
        draw.polygon([0, horizon, *line, width, horizon], fill=tuple(int(c) for c in np.clip(self.haze, 0, 255)))
        return image

    def _light_map(self, height: int, width: int) -> Image.Image:
        """What the night leaves of every pixel: the ambient light, headlights on the road, a hole for the moon."""
        v, u = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)
        cone = np.exp(-(((u - 0.5) / (0.12 + 0.5 * np.clip(v - HORIZON, 0, 1))) ** 2) - ((v - 0.68) / 0.2) ** 2)
        levels = np.array(self.ambient) + (np.array((0.95, 0.9, 0.75)) - self.ambient) * cone[..., None]
        image = Image.fromarray((levels * 255).astype(np.uint8))
        draw, (mu, mv), r = ImageDraw.Draw(image), self.disc, 0.035 * height
        draw.ellipse((mu * width - r, mv * height - r, mu * width + r, mv * height + r), fill=(255, 255, 255))
        return image

    def _frame(self, background: Image.Image, lamps: Image.Image | None, time: float) -> Image.Image:
        """One frame, painted from far to near; at night it is then darkened and the lit lamps are drawn on top."""
        view = View(background.copy(), self._bend(time), self.light, self.haze)
        draw_road(view, self.road, self.left, self.right, self.speed * time)
        states = self.car_states(time)
        things = [(z, self.cars[slot]) for slot, z in states] + self._visible_roadside(time)
        for z, thing in sorted(things, key=lambda pair: -pair[0]):
            if isinstance(thing, Car):
                draw_car(view, thing, z)
            else:
                kind, _, x, size, first, second = thing
                if kind == "tree":
                    draw_tree(view, x, z, size, first, self.land)
                elif kind == "house":
                    draw_house(view, x, z, size, first, second)
                else:
                    draw_sign(view, x, z, first)
        if lamps is None:
            return view.image
        dark = View(ImageChops.multiply(view.image, lamps), view.curvature, self.light, self.haze)
        for i, (slot, z) in enumerate(states):
            nearer = [self.cars[s].box(w, view.curvature) for s, w in states[i + 1 :]]
            u, v = project(self.cars[slot].x, 0.5 * self.cars[slot].height, z, view.curvature)
            if z > NEAR and not any(b[0] < u < b[2] and b[1] < v < b[3] for b in nearer):
                draw_lights(dark, self.cars[slot], z, lit=True)
        return dark.image

    def _visible_roadside(self, time: float) -> list[tuple[float, tuple]]:
        """(distance, table row) of what stands beside the road within sight."""
        travelled, result = self.speed * time, []
        for side, table in enumerate(self.roadside):
            first = int(travelled // SLOT)
            for i in range(first, first + int(FAR // SLOT) + 2):
                row = table[i % SLOTS]
                z = i * SLOT + side * SLOT / 2 + row[1] - travelled
                if 4.0 < z < FAR:
                    result.append((z, row))
        return result


def scene_behind(seed: int | Sequence[int], **look: object) -> Scene:
    """The drive of a seed behind a car that looks as told (fields of Car): the nearest one ahead, or one put there."""
    scene = Scene(seed)
    ahead = [car for car in scene.cars if not car.oncoming]
    if not ahead:
        ahead = [Car("red", 0.0, 1.85, 1.5, 7.0 + 0.4 * scene.drift, 1.2, 16.0)]
        scene.cars += ahead
    nearest = min(ahead, key=lambda car: car.start)
    scene.cars[scene.cars.index(nearest)] = replace(nearest, **look)
    scene.caption = scene._describe()
    return scene


def van_scene(seed: int | Sequence[int]) -> Scene:
    """Behind the van that lesson 10 teaches: purple with yellow bands, taller and boxier than any other car."""
    return scene_behind(seed, colour="purple", stripes="yellow", width=2.1, height=2.5)

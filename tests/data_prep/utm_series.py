"""Krueger's series for the transverse Mercator projection of WGS 84, to the fourth order of n: a reference beside PROJ.

Formulas: Karney, Transverse Mercator with an accuracy of a few nanometers (2011), cut after the fourth order; geodetic
from conformal latitude by the series of the same order. The first term left out is below 0.01 mm.
"""

import numpy as np

A, F, K0 = 6378137.0, 1 / 298.257223563, 0.9996
N = F / (2 - F)
RADIUS = A / (1 + N) * (1 + N**2 / 4 + N**4 / 64)
ALPHA = (
    N / 2 - 2 * N**2 / 3 + 5 * N**3 / 16 + 41 * N**4 / 180,
    13 * N**2 / 48 - 3 * N**3 / 5 + 557 * N**4 / 1440,
    61 * N**3 / 240 - 103 * N**4 / 140,
    49561 * N**4 / 161280,
)
BETA = (
    N / 2 - 2 * N**2 / 3 + 37 * N**3 / 96 - N**4 / 360,
    N**2 / 48 + N**3 / 15 - 437 * N**4 / 1440,
    17 * N**3 / 480 - 37 * N**4 / 840,
    4397 * N**4 / 161280,
)
DELTA = (
    2 * N - 2 * N**2 / 3 - 2 * N**3 + 116 * N**4 / 45,
    7 * N**2 / 3 - 8 * N**3 / 5 - 227 * N**4 / 45,
    56 * N**3 / 15 - 136 * N**4 / 35,
    4279 * N**4 / 630,
)


def to_utm(lon, lat, zone):
    """Degrees -> easting, northing in metres; northings are negative south of the equator."""
    lam = np.radians((np.asarray(lon) - (6 * zone - 183) + 180) % 360 - 180)
    phi, e = np.radians(lat), 2 * np.sqrt(N) / (1 + N)
    t = np.sinh(np.arctanh(np.sin(phi)) - e * np.arctanh(e * np.sin(phi)))
    xi, eta = np.arctan2(t, np.cos(lam)), np.arcsinh(np.sin(lam) / np.hypot(t, np.cos(lam)))
    x, y = eta.copy(), xi.copy()
    for j, alpha in enumerate(ALPHA, 1):
        y += alpha * np.sin(2 * j * xi) * np.cosh(2 * j * eta)
        x += alpha * np.cos(2 * j * xi) * np.sinh(2 * j * eta)
    return 500000 + K0 * RADIUS * x, K0 * RADIUS * y


def to_degrees(east, north, zone):
    """Easting, northing in metres (negative south of the equator) -> longitude in -180..180, latitude."""
    xi, eta = np.asarray(north) / (K0 * RADIUS), (np.asarray(east) - 500000) / (K0 * RADIUS)
    x, y = eta.copy(), xi.copy()
    for j, beta in enumerate(BETA, 1):
        y -= beta * np.sin(2 * j * xi) * np.cosh(2 * j * eta)
        x -= beta * np.cos(2 * j * xi) * np.sinh(2 * j * eta)
    chi = np.arcsin(np.sin(y) / np.cosh(x))
    phi = chi.copy()
    for j, delta in enumerate(DELTA, 1):
        phi += delta * np.sin(2 * j * chi)
    lon = np.degrees(np.arctan2(np.sinh(x), np.cos(y))) + 6 * zone - 183
    return (lon + 180) % 360 - 180, np.degrees(phi)

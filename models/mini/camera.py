"""The world's camera: a pinhole that may pan, orbit or zoom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.mini.rays import FloatArray, array, dot, unit
from models.mini.world import CameraMove

IntArray = NDArray[np.int64]

POSITION = (0.0, 1.7, 6.0)
TARGET = (0.0, 0.6, 0.0)
FOV = 40.0
# How far each move goes in its first second and, mirrored, comes from: degrees, or the logarithm of the field of view.
PAN_DEGREES = (6.5, 9.0)
ORBIT_DEGREES = (17.0, 23.0)
ZOOM = (0.18, 0.24)


@dataclass(frozen=True, slots=True)
class Camera:
    """Per-frame position and target `[frames, 3]`, and vertical field of view `[frames]` in degrees."""

    positions: FloatArray
    targets: FloatArray
    fov_degrees: FloatArray

    @classmethod
    def still(cls, frames: int) -> Camera:
        return cls.moving("still", 0.0, array(np.zeros(frames)))

    @classmethod
    def moving(cls, move: CameraMove, extent: float, time: FloatArray) -> Camera:
        """A camera that is in its middle pose after one second, `extent` (see the ranges above) away before and after.

        Pans and zooms end after two seconds; an orbit goes on for as long as `time` (seconds, `[frames]`) does. Orbits
        go to the right.
        """
        frames = len(time)
        positions = np.tile(array(POSITION), (frames, 1))
        targets = np.tile(array(TARGET), (frames, 1))
        fov = np.full(frames, FOV, np.float32)
        moved = np.minimum(time - 1, 1)
        match move:
            case "pan left" | "pan right":
                angle = np.radians(extent) * moved * (1 if move == "pan right" else -1)
                gaze = array(TARGET) - array(POSITION)
                cos, sin = np.cos(angle), np.sin(angle)
                flat = [cos * gaze[0] - sin * gaze[2], np.full(frames, gaze[1]), sin * gaze[0] + cos * gaze[2]]
                targets = positions + array(np.stack(flat, -1))
            case "orbit":
                angle = np.radians(extent) * (time - 1)
                positions[:, 0] = POSITION[2] * np.sin(angle)
                positions[:, 2] = POSITION[2] * np.cos(angle)
            case "zoom in" | "zoom out":
                fov = fov * np.exp(extent * moved * (1 if move == "zoom out" else -1)).astype(np.float32)
            case "still":
                pass
        return cls(positions, targets, fov)

    def basis(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Right, up and forward unit vectors, `[frames, 3]` each."""
        forward = unit(self.targets - self.positions)
        right = unit(np.cross(forward, array([0.0, 1.0, 0.0])).astype(np.float32))
        return right, np.cross(right, forward).astype(np.float32), forward

    @property
    def moves(self) -> bool:
        return any(bool(np.ptp(values, 0).any()) for values in (self.positions, self.targets, self.fov_degrees))

    def directions(self, frame: IntArray, y: NDArray[Any], x: NDArray[Any], height: int, width: int) -> FloatArray:
        """Unit directions `[rays, 3]` through image points (pixels; the centre of the first is 0.5, 0.5)."""
        right, up, forward = self.basis()
        reach = (np.tan(np.radians(self.fov_degrees) / 2) / (height / 2)).astype(np.float32)[frame]
        across = ((x - width / 2) * reach).astype(np.float32)[:, None]
        down = ((y - height / 2) * reach).astype(np.float32)[:, None]
        return unit(forward[frame] + right[frame] * across - up[frame] * down)

    def project(self, points: FloatArray, height: int, width: int) -> FloatArray:
        """Image points `[..., frames, 2]` (x, y in pixels) of world points `[..., frames, 3]`."""
        right, up, forward = self.basis()
        offset = points - self.positions
        depth = np.maximum(dot(offset, forward), 0.1)
        scale = height / (2 * np.tan(np.radians(self.fov_degrees) / 2))
        x = width / 2 + scale * dot(offset, right) / depth
        y = height / 2 - scale * dot(offset, up) / depth
        return np.stack([x, y], -1).astype(np.float32)

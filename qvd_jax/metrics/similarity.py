"""Similarity of frames with a text and with each other, in CLIP's space (arXiv 2103.00020)."""

import numpy as np

CONSISTENCY_FRAMES = 2
"""Frames that `frame_consistency` needs."""


def clip_score(frames: np.ndarray, text: np.ndarray) -> float:
    """CLIPSIM (Wu et al., arXiv 2104.14806): the mean cosine of frames and text, in percent.

    Args:
      frames: embeddings `[F, C]`.
      text: embedding `[C]`.
    """
    return float(100 * (_unit(frames) @ _unit(text)).mean())


def frame_consistency(frames: np.ndarray) -> float:
    """The mean cosine of each frame and the next (Esser et al., arXiv 2302.03011), in percent.

    Args:
      frames: embeddings `[F, C]`, F at least 2.
    """
    if len(frames) < CONSISTENCY_FRAMES:
        raise ValueError(f"{len(frames)} frames have no next; {CONSISTENCY_FRAMES} are needed")
    unit = _unit(frames)
    return float(100 * (unit[1:] * unit[:-1]).sum(-1).mean())


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length one, in double precision."""
    vectors = vectors.astype(np.float64)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)

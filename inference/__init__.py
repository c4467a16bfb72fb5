"""Tracks of a trained model. `track_video` is the one call from a clip to its tracks."""

from inference.clip_run import track_video

__all__ = ["track_video"]

"""Tests of the main job: one head in, an implant out."""

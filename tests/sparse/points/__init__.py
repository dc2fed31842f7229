"""Tests of the points room."""

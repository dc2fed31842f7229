"""Tests of the C-LSTM wing."""

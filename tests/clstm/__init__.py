"""Tests of C-LSTM."""

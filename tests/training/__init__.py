"""Tests of training, on tiny images unless they say otherwise."""

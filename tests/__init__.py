"""Tests of Sluice, named after what they claim."""

"""Tests of dsmoe.config and of the command line on top of it."""
